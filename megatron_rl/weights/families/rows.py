"""The rows of the tables, each a rule: the parameters that decoder families share, as pure data.

A row names one parameter in Megatron-Core's local layers, in Hugging Face files and in vLLM.
"""

from dataclasses import replace

from megatron_rl.weights.arch import DeltaArch, LatentArch, ModelArch
from megatron_rl.weights.rules import (
    Copy,
    Down,
    ExpertStack,
    GatedQkv,
    GateUp,
    Qkv,
    Rule,
    Section,
    Sections,
    Size,
    Stacked,
    Vocab,
)

MEGATRON_LAYER = "decoder.layers.{i}."
HF_LAYER = "model.layers.{i}."

EMBEDDING = Vocab(
    megatron="embedding.word_embeddings.weight",
    hf="model.embed_tokens.weight",
    engine="model.embed_tokens.weight",
)
HEAD = Vocab(megatron="output_layer.weight", hf="lm_head.weight", engine="lm_head.weight")
# The last pipeline stage's own copy of a tied embedding: another holder of the same tensor.
TIED_HEAD_COPY = Vocab(megatron="output_layer.weight", hf=EMBEDDING.hf, engine=EMBEDDING.engine)
FINAL_NORM = Copy(
    megatron="decoder.final_layernorm.weight",
    hf="model.norm.weight",
    engine="model.norm.weight",
    shape=lambda arch: (arch.hidden_size,),
)


def _ffn_rows(arch: ModelArch) -> int:
    return arch.ffn_hidden_size


def _expert_rows(arch: ModelArch) -> int:
    assert arch.mixture is not None
    return arch.mixture.ffn_hidden_size


def _shared_expert_rows(arch: ModelArch) -> int:
    assert arch.mixture is not None
    return arch.mixture.shared_ffn_hidden_size


def _num_experts(arch: ModelArch) -> int:
    assert arch.mixture is not None
    return arch.mixture.num_experts


def _latent(arch: ModelArch) -> LatentArch:
    assert arch.latent is not None
    return arch.latent


def _query_rank(arch: ModelArch) -> int:
    rank = _latent(arch).query_rank
    assert rank is not None
    return rank


def _raised_rows(arch: ModelArch) -> int:
    latent = _latent(arch)
    return arch.num_attention_heads * (latent.still_dim + latent.value_dim)


def _feed_forward(megatron: str, hf: str, rows: Size) -> tuple[Rule, ...]:
    """The matrices of a feed-forward network, whose output projection tensor parallelism cuts."""
    megatron, hf = MEGATRON_LAYER + megatron, HF_LAYER + hf
    return (
        GateUp(
            megatron=megatron + ".linear_fc1.weight",
            hf_gate=hf + ".gate_proj.weight",
            hf_up=hf + ".up_proj.weight",
            engine=hf + ".gate_up_proj.weight",
            rows=rows,
        ),
        Copy(
            megatron=megatron + ".linear_fc2.weight",
            hf=hf + ".down_proj.weight",
            engine=hf + ".down_proj.weight",
            shape=lambda arch: (arch.hidden_size, rows(arch)),
            axis=1,
        ),
    )


def _norm(megatron: str, hf: str) -> Copy:
    return Copy(
        megatron=MEGATRON_LAYER + megatron,
        hf=HF_LAYER + hf,
        engine=HF_LAYER + hf,
        shape=lambda arch: (arch.hidden_size,),
    )


def _head_norm(proj: str) -> Copy:
    return Copy(
        megatron=MEGATRON_LAYER + f"self_attention.{proj}_layernorm.weight",
        hf=HF_LAYER + f"self_attn.{proj}_norm.weight",
        engine=HF_LAYER + f"self_attn.{proj}_norm.weight",
        shape=lambda arch: (arch.head_dim,),
    )


ATTENTION: tuple[Rule, ...] = (
    _norm("input_layernorm.weight", "input_layernorm.weight"),
    Qkv(
        megatron=MEGATRON_LAYER + "self_attention.linear_qkv.weight",
        hf=HF_LAYER + "self_attn.{proj}_proj.weight",
        engine=HF_LAYER + "self_attn.qkv_proj.weight",
    ),
    Copy(
        megatron=MEGATRON_LAYER + "self_attention.linear_proj.weight",
        hf=HF_LAYER + "self_attn.o_proj.weight",
        engine=HF_LAYER + "self_attn.o_proj.weight",
        shape=lambda arch: (arch.hidden_size, arch.query_rows),
        axis=1,
    ),
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
# Files with one tensor for each product, as Phi-3 has them.
STACKED_ATTENTION: tuple[Rule, ...] = tuple(
    Stacked(rule=rule, hf=HF_LAYER + "self_attn.qkv_proj.weight") if isinstance(rule, Qkv) else rule
    for rule in ATTENTION
)
QKV_BIAS = Qkv(
    megatron=MEGATRON_LAYER + "self_attention.linear_qkv.bias",
    hf=HF_LAYER + "self_attn.{proj}_proj.bias",
    engine=HF_LAYER + "self_attn.qkv_proj.bias",
    is_bias=True,
)
QK_NORM: tuple[Rule, ...] = (_head_norm("q"), _head_norm("k"))


def _wide_norm(proj: str, rows: Size) -> Copy:
    """A norm over all heads, with the weights of all of them on every rank."""
    return replace(_head_norm(proj), shape=lambda arch: (rows(arch),))


WIDE_QK_NORM: tuple[Rule, ...] = (
    _wide_norm("q", lambda arch: arch.query_rows),
    _wide_norm("k", lambda arch: arch.key_rows),
)
# Attention with norms behind it and behind the feed-forward network, and none before.
NORMED_ATTENTION: tuple[Rule, ...] = (
    *(rule for rule in ATTENTION if not rule.megatron.endswith("layernorm.weight")),
    *WIDE_QK_NORM,
    _norm("self_attention.linear_proj.norm.weight", "post_attention_layernorm.weight"),
    _norm("mlp.linear_fc2.norm.weight", "post_feedforward_layernorm.weight"),
)


def _latent_norm(vector: str, rank: Size) -> Copy:
    return Copy(
        megatron=MEGATRON_LAYER + f"self_attention.{vector}_layernorm.weight",
        hf=HF_LAYER + f"self_attn.{vector}_a_layernorm.weight",
        engine=HF_LAYER + f"self_attn.{vector}_a_layernorm.weight",
        shape=lambda arch: (rank(arch),),
    )


def _heads(megatron: str, name: str, rows: Size, columns: Size) -> Copy:
    """A product whose rows are those of heads, which tensor parallelism cuts."""
    return Copy(
        megatron=MEGATRON_LAYER + f"self_attention.{megatron}.weight",
        hf=HF_LAYER + f"self_attn.{name}.weight",
        engine=HF_LAYER + f"self_attn.{name}.weight",
        shape=lambda arch: (rows(arch), columns(arch)),
        axis=0,
    )


# Latent attention. The engine has what makes both latent vectors in one matrix, if there are two.
_KEYS_DOWN = Down(
    megatron=MEGATRON_LAYER + "self_attention.linear_kv_down_proj.weight",
    hf=HF_LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    engine=HF_LAYER + "self_attn.kv_a_proj_with_mqa.weight",
    rows=lambda arch: _latent(arch).down_rows,
)
QUERIES: tuple[Rule, ...] = (
    _heads("linear_q_proj", "q_proj", lambda a: a.query_rows, lambda a: a.hidden_size),
    _KEYS_DOWN,
)
LATENT_QUERIES: tuple[Rule, ...] = (
    Down(
        megatron=MEGATRON_LAYER + "self_attention.linear_q_down_proj.weight",
        hf=HF_LAYER + "self_attn.q_a_proj.weight",
        engine=HF_LAYER + "self_attn.fused_qkv_a_proj.weight",
        rows=_query_rank,
    ),
    _latent_norm("q", _query_rank),
    _heads("linear_q_up_proj", "q_b_proj", lambda a: a.query_rows, _query_rank),
    replace(
        _KEYS_DOWN,
        engine=HF_LAYER + "self_attn.fused_qkv_a_proj.weight",
        engine_at=_query_rank,
    ),
)
LATENT_ATTENTION: tuple[Rule, ...] = (
    _norm("input_layernorm.weight", "input_layernorm.weight"),
    *QUERIES,
    *LATENT_QUERIES,  # either
    _latent_norm("kv", lambda arch: _latent(arch).rank),
    _heads("linear_kv_up_proj", "kv_b_proj", _raised_rows, lambda arch: _latent(arch).rank),
    Copy(
        megatron=MEGATRON_LAYER + "self_attention.linear_proj.weight",
        hf=HF_LAYER + "self_attn.o_proj.weight",
        engine=HF_LAYER + "self_attn.o_proj.weight",
        shape=lambda arch: (arch.hidden_size, arch.value_rows),
        axis=1,
    ),
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)

# Attention whose output has gates, and the gated delta net of other layers.
GATED_ATTENTION: tuple[Rule, ...] = tuple(
    GatedQkv(megatron=rule.megatron, hf=rule.hf, engine=rule.engine)
    if isinstance(rule, Qkv)
    else rule
    for rule in ATTENTION
)


def _delta(arch: ModelArch) -> DeltaArch:
    assert arch.delta is not None
    return arch.delta


def _key_rows(arch: ModelArch) -> int:
    return _delta(arch).key_rows


def _value_rows(arch: ModelArch) -> int:
    return _delta(arch).value_rows


def _value_heads(arch: ModelArch) -> int:
    return _delta(arch).num_value_heads


_NET, _HF_NET = MEGATRON_LAYER + "self_attention.", HF_LAYER + "linear_attn."


def _mixed(hf: str, engine: str) -> tuple[Section, ...]:
    """The rows of queries, keys and values, which Hugging Face has in one tensor."""
    hf, engine = _HF_NET + hf, _HF_NET + engine
    return (
        Section(name="query", hf=hf, engine=engine, rows=_key_rows),
        Section(name="key", hf=hf, engine=engine, rows=_key_rows, hf_at=_key_rows),
        Section(
            name="value",
            hf=hf,
            engine=engine,
            rows=_value_rows,
            hf_at=lambda arch: 2 * _key_rows(arch),
        ),
    )


def _beside(name: str, letter: str, engine: str, rows: Size) -> Section:
    hf = f"{_HF_NET}in_proj_{letter}.weight"
    return Section(name=name, hf=hf, engine=_HF_NET + engine, rows=rows)


def _of_value_heads(name: str) -> Copy:
    """A number for each head of values."""
    return Copy(
        megatron=_NET + name,
        hf=_HF_NET + name,
        engine=_HF_NET + name,
        shape=lambda arch: (_value_heads(arch),),
        axis=0,
    )


DELTA_NET: tuple[Rule, ...] = (
    _norm("input_layernorm.weight", "input_layernorm.weight"),
    _of_value_heads("dt_bias"),
    _of_value_heads("A_log"),
    Sections(
        megatron=_NET + "in_proj.weight",
        sections=(
            *_mixed("in_proj_qkv.weight", "in_proj_qkvz.weight"),
            _beside("z", "z", "in_proj_qkvz.weight", _value_rows),
            _beside("beta", "b", "in_proj_ba.weight", _value_heads),
            _beside("alpha", "a", "in_proj_ba.weight", _value_heads),
        ),
        rest=lambda arch: (arch.hidden_size,),
    ),
    Sections(
        megatron=_NET + "conv1d.weight",
        sections=_mixed("conv1d.weight", "conv1d.weight"),
        rest=lambda arch: (1, _delta(arch).kernel),
    ),
    Copy(
        megatron=_NET + "out_norm.weight",
        hf=_HF_NET + "norm.weight",
        engine=_HF_NET + "norm.weight",
        shape=lambda arch: (_delta(arch).value_dim,),
    ),
    Copy(
        megatron=_NET + "out_proj.weight",
        hf=_HF_NET + "out_proj.weight",
        engine=_HF_NET + "out_proj.weight",
        shape=lambda arch: (arch.hidden_size, _value_rows(arch)),
        axis=1,
    ),
    _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)

DENSE = _feed_forward("mlp", "mlp", _ffn_rows)
STACKED_DENSE: tuple[Rule, ...] = tuple(
    Stacked(rule=rule, hf=HF_LAYER + "mlp.gate_up_proj.weight")
    if isinstance(rule, GateUp)
    else rule
    for rule in DENSE
)
SHARED_EXPERT = _feed_forward("mlp.shared_experts", "mlp.shared_experts", _shared_expert_rows)
GATED_SHARED_EXPERT: tuple[Rule, ...] = (
    *_feed_forward("mlp.shared_experts", "mlp.shared_expert", _shared_expert_rows),
    Copy(
        megatron=MEGATRON_LAYER + "mlp.shared_experts.gate_weight",
        hf=HF_LAYER + "mlp.shared_expert_gate.weight",
        engine=HF_LAYER + "mlp.shared_expert_gate.weight",
        shape=lambda arch: (1, arch.hidden_size),
    ),
)
# What corrects the choice of experts (arXiv:2408.15664): float32 whatever the model's dtype, and no
# gradient reaches it.
ROUTER_BIAS = Copy(
    megatron=MEGATRON_LAYER + "mlp.router.expert_bias",
    hf=HF_LAYER + "mlp.gate.e_score_correction_bias",
    engine=HF_LAYER + "mlp.gate.e_score_correction_bias",
    shape=lambda arch: (_num_experts(arch),),
    in_float32=True,
)


def router(block: str) -> tuple[Rule, ...]:
    """The router of a mixture; `block` is the mixture's name in a Hugging Face layer."""
    return (
        Copy(
            megatron=MEGATRON_LAYER + "mlp.router.weight",
            hf=HF_LAYER + f"{block}.gate.weight",
            engine=HF_LAYER + f"{block}.gate.weight",
            shape=lambda arch: (_num_experts(arch), arch.hidden_size),
        ),
    )


def experts(block: str, *, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The matrices of one expert; the engine stacks a layer's experts along a first axis."""
    megatron, hf = MEGATRON_LAYER + "mlp.experts.local_experts.{e}.", HF_LAYER + f"{block}.experts."
    return (
        GateUp(
            megatron=megatron + "linear_fc1.weight",
            hf_gate=hf + f"{{e}}.{gate}.weight",
            hf_up=hf + f"{{e}}.{up}.weight",
            engine=hf + "routed_experts.w13_weight",
            rows=_expert_rows,
        ),
        Copy(
            megatron=megatron + "linear_fc2.weight",
            hf=hf + f"{{e}}.{down}.weight",
            engine=hf + "routed_experts.w2_weight",
            shape=lambda arch: (arch.hidden_size, _expert_rows(arch)),
            axis=1,
        ),
    )


def expert_stacks(block: str, *, gate: str, up: str, down: str) -> tuple[ExpertStack, ...]:
    """Files with one tensor for gate over up of all experts of a layer, and one for down."""
    hf = HF_LAYER + f"{block}.experts."
    return (
        ExpertStack(
            hf=hf + f"{gate.removesuffix('_proj')}_{up}",
            of=(hf + f"{{e}}.{gate}.weight", hf + f"{{e}}.{up}.weight"),
        ),
        ExpertStack(hf=hf + down, of=(hf + f"{{e}}.{down}.weight",)),
    )
