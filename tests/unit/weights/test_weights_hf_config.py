import pytest
from hub_configs import (
    CONFIGS,
    GLM4_MOE,
    LLAMA,
    LLAMA3_SCALING,
    MISTRAL,
    MIXTRAL,
    NUM_PARAMETERS,
    OLMO2,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
)

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import MixtureArch, YarnRope
from megatron_rl.weights.families.registry import read_model_config


def test_qwen2_is_read(read):
    arch = read(QWEN2)
    assert (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == (28, 1536, 8960)
    assert (arch.num_attention_heads, arch.num_query_groups, arch.head_dim) == (12, 2, 128)
    assert (arch.rope_theta, arch.rope_scaling_factor) == (10000.0, None)
    assert (arch.qkv_bias, arch.tied_embeddings) == (True, True)
    # 28 layers of 1536 * (1536 + 2 * 256 + 1536) + 2048 + 3 * 1536 * 8960 + 2 * 1536
    # = 46,797,824 each, the embedding's 233,373,696, and the last norm: the model card's 1.54B.
    assert arch.num_parameters == 28 * 46_797_824 + 233_373_696 + 1536 == 1_543_714_304


def test_llama3_is_read(read):
    arch = read(LLAMA)
    assert (arch.rope_theta, arch.rope_scaling_factor) == (500000.0, 32.0)
    assert (arch.qkv_bias, arch.tied_embeddings, arch.rms_norm_eps) == (False, True, 1e-5)
    assert arch.num_parameters == 3_212_749_824  # the 3.21B of the model card


@pytest.mark.parametrize("family", CONFIGS)
def test_the_models_of_the_hub_have_their_size(read, family):
    assert read(CONFIGS[family]).num_parameters == NUM_PARAMETERS[family]


def test_mixtures_are_read(read):
    mixture = read(QWEN3_MOE).mixture
    assert (mixture.num_experts, mixture.top_k, mixture.ffn_hidden_size) == (128, 8, 768)
    assert (mixture.renormalized, mixture.dense_layers) == (True, frozenset())
    mixture = read(MIXTRAL).mixture
    assert (mixture.num_experts, mixture.top_k, mixture.ffn_hidden_size) == (8, 2, 14336)
    assert (mixture.renormalized, mixture.dense_layers) == (True, frozenset())
    assert read(QWEN3_MOE, norm_topk_prob=False).mixture.renormalized is False


@pytest.mark.parametrize(
    ("step", "listed", "dense"),
    [(1, [], []), (1, [0, 5], [0, 5]), (2, [], [0, 2, 4]), (3, [2], [0, 1, 2, 3, 4])],
)
def test_layers_without_experts(read, step, listed, dense):
    """Six layers; transformers: experts iff not listed and step divides the number plus one."""
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": step, "mlp_only_layers": listed}
    arch = read(QWEN3_MOE, **changes)
    assert [layer for layer in range(6) if not arch.has_experts(layer)] == dense


def as_transformers_5_writes(config):
    """Another spelling of dtype, rope and the number of experts."""
    old = ("rope_theta", "rope_scaling", "torch_dtype", "num_experts")
    new = {name: value for name, value in config.items() if name not in old}
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    new["rope_parameters"] = {**scaling, "rope_theta": config["rope_theta"]}
    if "num_experts" in config:
        new["num_local_experts"] = config["num_experts"]
    if config["model_type"].startswith("qwen"):
        layers = config["num_hidden_layers"]
        new |= {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    return {**new, "dtype": config["torch_dtype"], "transformers_version": "5.19.0"}


@pytest.mark.parametrize("family", [name for name in CONFIGS if "rope_theta" in CONFIGS[name]])
def test_spellings_of_transformers_4_and_5_are_the_same_model(read, family):
    assert read(CONFIGS[family]) == read(as_transformers_5_writes(CONFIGS[family]))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_scaling and rope_parameters are two spellings of one thing and differ",
        ),
        (
            QWEN3,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta, rope_scaling and rope_parameters are two spellings of one thing",
        ),
        (
            QWEN3_MOE,
            {"num_local_experts": 64},
            "num_experts=128 and num_local_experts=64 are two spellings of one thing and differ",
        ),
    ],
)
def test_two_spellings_that_disagree_are_refused(read, config, changes, message):
    with pytest.raises(InputError, match=message):
        read(config, **changes)


OPTIONAL = (
    "head_dim",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "use_sliding_window",
)


@pytest.mark.parametrize(
    ("family", "absent"),
    [
        (f, name)
        for f, config in CONFIGS.items()
        for name in OPTIONAL
        if name in config
        if "kv_lora_rank" not in config and f != "phi3"  # those have tests of their own
    ],
)
def test_an_absent_field_is_what_transformers_takes(read, tmp_path, family, absent):
    """So that the policy is the model that transformers and vLLM build from the same file."""
    from transformers import AutoConfig

    heads = {"num_attention_heads": 32}  # which every default of key heads divides
    arch = read(CONFIGS[family], without=(absent,), **heads)
    theirs = AutoConfig.from_pretrained(tmp_path)
    derived = theirs.hidden_size // theirs.num_attention_heads
    assert arch.head_dim == (getattr(theirs, "head_dim", None) or derived)
    assert arch.num_query_groups == theirs.num_key_value_heads
    assert arch.rms_norm_eps == theirs.rms_norm_eps
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"]
    assert arch.tied_embeddings == theirs.tie_word_embeddings
    if family == "qwen3_moe":
        assert arch.mixture.renormalized == theirs.norm_topk_prob
        assert not arch.mixture.dense_layers
        assert (theirs.decoder_sparse_step, theirs.mlp_only_layers) == (1, [])


def test_olmo_2_is_read(read):
    arch = read(OLMO2)
    assert (arch.qk_norm, arch.wide_qk_norm, arch.norms_behind) == (True, True, True)
    assert arch.turns_in_float32
    assert not read(QWEN3).wide_qk_norm
    assert not read(LLAMA).norms_behind
    # 32 layers of 4 * 4096 ** 2 + 3 * 4096 * 11008 and 4 norms of 4096, two embeddings, a norm.
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 4 * 4096
    assert arch.num_parameters == 32 * layer + 2 * 100352 * 4096 + 4096 == 7_298_617_344


def test_the_fields_of_sigmoid_routers(read):
    arch = read(GLM4_MOE, first_k_dense_replace=3, routed_scaling_factor=2.5, n_shared_experts=2)
    assert arch.rotary_dim == 64
    assert arch.described.endswith(" (without 1 behind the last layer, for guessing ahead)")
    assert "behind" not in read(GLM4_MOE, without=("num_nextn_predict_layers",)).described
    assert not arch.qk_norm
    assert read(GLM4_MOE, use_qk_norm=True).qk_norm
    assert arch.mixture == MixtureArch(
        num_experts=128,
        ffn_hidden_size=1408,
        top_k=8,
        renormalized=True,
        dense_layers=frozenset({0, 1, 2}),
        score="sigmoid",
        has_bias=True,
        scale=2.5,
        shared_ffn_hidden_size=2816,
    )
    assert not read(GLM4_MOE, first_k_dense_replace=0).mixture.dense_layers
    assert read(GLM4_MOE, partial_rotary_factor=1.0).rotary_dim is None


def test_null_fields_are_derived(read):
    assert read(LLAMA, head_dim=None).head_dim == 128
    assert read(LLAMA, num_key_value_heads=None).num_query_groups == 24
    assert read(MIXTRAL).head_dim == 4096 // 32


def test_an_absent_window_is_one_where_transformers_takes_it_so(read):
    assert read(MISTRAL).sliding is None
    assert read(MISTRAL, without=("sliding_window",)) == read(MISTRAL, sliding_window=4096)
    assert read(MIXTRAL, without=("sliding_window",)) == read(MIXTRAL)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GLM4_MOE, {"attention_bias": False}, "attention_bias=False is not supported"),
        (GLM4_MOE, {"n_group": 8}, r"n_group=8 is not supported.*only \(1,\)"),
        (GLM4_MOE, {"norm_topk_prob": False}, "norm_topk_prob=False is not supported"),
        (GLM4_MOE, {"num_experts": 4}, "num_experts=4 is not supported.*not known"),
        (GLM4_MOE, {"first_k_dense_replace": 46}, "first_k_dense_replace leave no layer with exp"),
        (GLM4_MOE, {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be a positive"),
        (GLM4_MOE, {"routed_scaling_factor": 0}, "routed_scaling_factor=0 must be a positive num"),
        (GLM4_MOE, {"partial_rotary_factor": 0.51}, "turns 65 entries of a head of 128"),
        (GLM4_MOE, {"partial_rotary_factor": 1.5}, "turns 192 entries of a head of 128"),
        (
            GLM4_MOE,
            {"rope_parameters": {"rope_theta": 1000000, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor is 0.5, and 0.25 in rope_parameters",
        ),
        (OLMO2, {"attention_bias": True}, "attention_bias=True is not supported"),
        (OLMO2, {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported.*not known"),
        (OLMO2, {"sliding_window": 4096}, "sliding_window=4096 is not supported"),
        (OLMO2, {"use_qk_norm": False}, "use_qk_norm=False is not supported"),
        (OLMO2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (OLMO2, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (OLMO2, {"model_type": "olmo"}, "model_type='olmo' is not supported: known are"),
        (MIXTRAL, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported.*not known"),
        (QWEN2, {"logit_scale": 2.0}, "logit_scale=2.0 is not supported.*not known"),
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (QWEN2, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (QWEN2, {"use_mrope": True}, "use_mrope=True"),
        (QWEN2, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, {"model_type": "gemma"}, "model_type='gemma' is not supported: known are"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive whole"),
        (LLAMA, {"hidden_size": 3072.5}, "hidden_size=3072.5 must be a positive whole"),
        (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps=None must be a positive number"),
        (LLAMA, {"rope_theta": "high"}, "rope_theta='high' must be a positive number"),
        (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads=5 must divide"),
        (LLAMA, {"use_mrope": True}, "use_mrope=True is not supported for llama"),
        (LLAMA, {"num_experts": 8}, "num_experts=8 is not supported for llama.*not known"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (LLAMA, {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        (QWEN3, {"attention_bias": True}, "attention_bias=True"),
        (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (MIXTRAL, {"sliding_window": 4096}, "sliding_window=4096 is not supported for mixtral"),
        (
            MISTRAL,
            {"sliding_window": 4096, "use_sliding_window": False},
            "use_sliding_window=False: transformers does not ask use_sliding_window of this",
        ),
        (MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with probabilities"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts=None must be a positive whole"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_exp"),
        (MIXTRAL, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        (QWEN3_MOE, {"n_shared_experts": 1}, "n_shared_experts=1"),
        (QWEN3_MOE, {"norm_topk_prob": None}, "norm_topk_prob=None must be true or false"),
        (QWEN3_MOE, {"mlp_only_layers": [48]}, r"mlp_only_layers=\[48\] must be a list of layers"),
        (QWEN3_MOE, {"decoder_sparse_step": 50}, "leave no layer with experts"),
    ],
)
def test_what_would_be_another_model_is_refused(read, config, changes, message):
    with pytest.raises(InputError, match=message):
        read(config, **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("low_freq_factor", 2.0), ("high_freq_factor", 8.0), ("original_max_position_embeddings", 1)],
)
def test_constants_that_megatron_has_built_in_are_checked(read, name, value):
    with pytest.raises(InputError, match=rf"{name}={value}: Megatron-Core's llama3"):
        read(LLAMA, rope_scaling={**LLAMA3_SCALING, name: value})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "default", "factor": 2.0}, "rope of type 'default' has factor=2.0"),
        ({**LLAMA3_SCALING, "beta_fast": 1}, "rope of type 'llama3' has beta_fast=1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor other"),
        ([1.0], r"rope_parameters=\[1.0\] must be an object"),
    ],
)
def test_an_unknown_setting_of_a_rope_is_refused(read, rope, message):
    with pytest.raises(InputError, match=message):
        read(LLAMA, without=("rope_scaling",), rope_parameters=rope)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "longrope"])
def test_other_ropes_are_refused(read, kind):
    for scaling in ({"type": kind, "factor": 2.0}, {"rope_type": kind, "factor": 2.0}):
        with pytest.raises(InputError, match=f"rope type '{kind}' is not supported"):
            read(LLAMA, rope_scaling=scaling)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_a_yarn_rope_has_the_defaults_of_transformers_and_the_engine(read):
    arch = read(QWEN2, rope_scaling=YARN, max_position_embeddings=131072)
    assert arch.yarn == YarnRope(
        factor=4.0,
        original_max_position_embeddings=32768,
        beta_fast=32.0,
        beta_slow=1.0,
        amplitude=1.1386294361119891,  # 0.1 ln(4) + 1
        rounds_range=True,
    )
    assert arch.max_position_embeddings == 131072
    assert read(QWEN2, rope_scaling=YARN, max_position_embeddings=10**6).yarn.positions == 131072


@pytest.mark.parametrize(
    ("told", "amplitude"),
    [
        ({"attention_factor": 1.0, "mscale": 3.0, "mscale_all_dim": 2.0}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0}, 1.1386294361119891),  # alone it is not read
    ],
)
def test_the_amplitude_of_a_yarn_rope(read, told, amplitude):
    assert read(QWEN2, rope_scaling=YARN | told).yarn.amplitude == amplitude


def test_positions_end_with_the_engines_table_of_angles(read):
    arch = read(QWEN2, rope_scaling=YARN | {"factor": 1.5}, max_position_embeddings=131072)
    assert arch.max_position_embeddings == 49152


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"factor": 0.5}, "factor=0.5: YaRN's is at least 1"),
        ({"factor": None}, "factor=None must be a positive number"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings=None must"),
        ({"beta_fast": 0.5}, "beta_slow=1.0, which must be no more than beta_fast=0.5"),
        ({"attention_factor": -1.0}, "attention_factor=-1.0 must be a positive number"),
        ({"truncate": "yes"}, "truncate='yes' must be true or false"),
        ({"low_freq_factor": 1.0}, "rope of type 'yarn' has low_freq_factor=1.0"),
        ({"attn_factor": 0.9}, r"set model.ignore_config_fields=\[attn_factor\]"),
    ],
)
def test_a_yarn_rope_that_cannot_be_meant_is_refused(read, told, message):
    with pytest.raises(InputError, match=message):
        read(QWEN2, rope_scaling=YARN | told)


def test_a_field_of_a_rope_may_be_ignored_by_name(read):
    plain = read(QWEN2, rope_scaling=YARN)
    assert read(QWEN2, rope_scaling=YARN | {"attn_factor": 0.9}, ignored=["attn_factor"]) == plain


@pytest.mark.parametrize("factor", [None, "32"])
def test_a_llama3_rope_needs_a_factor(read, factor):
    scaling = {k: v for k, v in {**LLAMA3_SCALING, "factor": factor}.items() if v is not None}
    with pytest.raises(InputError, match=f"factor={factor!r} must be a positive number"):
        read(LLAMA, rope_scaling=scaling)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": None},
        {"layer_types": ["full_attention", "sliding_attention"] * 14},
    ],
)
def test_sliding_windows_are_refused(read, changes):
    with pytest.raises(InputError, match=r"sliding_window|full_attention"):
        read(QWEN2, **changes)


def test_a_window_whose_use_is_not_told_is_refused(read):
    with pytest.raises(InputError, match="sliding_window=4096 is not supported"):
        read(LLAMA, sliding_window=4096)
    assert read(LLAMA, sliding_window=None) == read(LLAMA)


def test_directories_without_a_usable_config(tmp_path):
    with pytest.raises(InputError, match=r"it has no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(InputError, match="not JSON"):
        read_model_config(tmp_path)
