"""What all dense decoder families share: the table, and how config.json is read.

Adding a family: a file beside this one with its FAMILY (how it differs from the shared table, and
the config fields it honours), one line in registry.py, and its round-trip and parity tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.rules import Copy, GateUp, Qkv, Rule, Vocab

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


def _norm(megatron: str, hf: str) -> Copy:
    return Copy(
        megatron=MEGATRON_LAYER + megatron,
        hf=HF_LAYER + hf,
        engine=HF_LAYER + hf,
        shape=lambda arch: (arch.hidden_size,),
    )


LAYER: tuple[Rule, ...] = (
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
    GateUp(
        megatron=MEGATRON_LAYER + "mlp.linear_fc1.weight",
        hf_gate=HF_LAYER + "mlp.gate_proj.weight",
        hf_up=HF_LAYER + "mlp.up_proj.weight",
        engine=HF_LAYER + "mlp.gate_up_proj.weight",
    ),
    Copy(
        megatron=MEGATRON_LAYER + "mlp.linear_fc2.weight",
        hf=HF_LAYER + "mlp.down_proj.weight",
        engine=HF_LAYER + "mlp.down_proj.weight",
        shape=lambda arch: (arch.hidden_size, arch.ffn_hidden_size),
        axis=1,
    ),
)
QKV_BIAS = Qkv(
    megatron=MEGATRON_LAYER + "self_attention.linear_qkv.bias",
    hf=HF_LAYER + "self_attn.{proj}_proj.bias",
    engine=HF_LAYER + "self_attn.qkv_proj.bias",
    is_bias=True,
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: its table, and which config fields mean what."""

    model_type: str
    layer_rules: tuple[Rule, ...]
    qkv_bias: bool
    neutral: Mapping[str, tuple[object, ...]]
    """Fields we do not implement, with the values under which they change nothing."""


USED = {
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
}
# Fields of training, generation and bookkeeping that do not change the network.
IGNORED = {
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "initializer_range",
    "use_cache",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    "name_or_path",
    "_name_or_path",
    "_attn_implementation",
}
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
    "auto_map": (None,),
    "partial_rotary_factor": (1, 1.0),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
}
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_arch(family: Family, config: Mapping[str, object], where: str) -> ModelArch:
    """The sizes of a model; a field we would have to ignore although it matters is an error."""
    _refuse_unhonoured(family, config, where)

    def number(name: str, default: object = None) -> int:
        value = config.get(name, default)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: {name}={value!r} must be a positive whole number")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    epsilon = config.get("rms_norm_eps")
    if not isinstance(epsilon, float):
        raise InputError(
            f"{where}: rms_norm_eps={epsilon!r} must be a number, since families differ in their "
            "default. Add it to config.json"
        )
    theta, factor = _rope(config, where)
    return ModelArch(
        model_type=family.model_type,
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=number("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads),
        vocab_size=number("vocab_size"),
        rms_norm_eps=epsilon,
        rope_theta=theta,
        rope_scaling_factor=factor,
        max_position_embeddings=number("max_position_embeddings"),
        qkv_bias=family.qkv_bias,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _refuse_unhonoured(family: Family, config: Mapping[str, object], where: str) -> None:
    neutral = {**NEUTRAL, **family.neutral}
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list) and set(layer_types) - {"full_attention"}:
        raise InputError(
            f"{where}: layer_types={sorted(set(layer_types))} is not supported: only "
            "full_attention is. Use a model without sliding-window layers"
        )
    for name, value in config.items():
        if name in USED or name in IGNORED or name == "layer_types":
            continue
        is_off = value is None or config.get("use_sliding_window") is False
        if name == "sliding_window" and is_off:
            continue
        if name in neutral and value in neutral[name]:
            continue
        allowed = f"only {neutral[name]} is" if name in neutral else "the field is not known"
        raise InputError(
            f"{where}: {name}={value!r} is not supported for {family.model_type}: {allowed}. A "
            "setting that is ignored would train another model than the one you named"
        )


def _rope(config: Mapping[str, object], where: str) -> tuple[float, float | None]:
    """Base and llama3 factor, from the fields of transformers 4 or 5."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    scaling = new if isinstance(new, Mapping) else old if isinstance(old, Mapping) else {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(theta, int | float):
        raise InputError(f"{where}: rope_theta={theta!r} must be a number")
    if kind in ("default", None):
        return float(theta), None
    if kind != "llama3":
        raise InputError(
            f"{where}: rope type {kind!r} is not supported: default and llama3 are. Use a model "
            "with one of them"
        )
    for name, constant in LLAMA3_ROPE.items():
        if scaling.get(name) != constant:
            raise InputError(
                f"{where}: rope scaling has {name}={scaling.get(name)!r}: Megatron-Core's llama3 "
                f"rope has {constant} built in. Only that value can be trained"
            )
    factor = scaling.get("factor")
    if not isinstance(factor, int | float):
        raise InputError(f"{where}: rope scaling: factor={factor!r} must be a number")
    return float(theta), float(factor)
