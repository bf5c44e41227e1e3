import json

import pytest

from megatron_rl.errors import InputError
from megatron_rl.weights.families.registry import read_model_config

QWEN2 = {  # Qwen2.5-Math-1.5B, as written by transformers 4
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 4096,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {  # Llama-3.2-3B-Instruct, as written by transformers 4
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 128256,
}


@pytest.fixture
def read(tmp_path):
    def read(config, without=(), **changes):
        config = {k: v for k, v in {**config, **changes}.items() if k not in without}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_model_config(tmp_path)

    return read


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


def test_spellings_of_transformers_4_and_5_are_the_same_model(read):
    old_fields = ("rope_theta", "rope_scaling", "torch_dtype")
    new = {"dtype": "bfloat16", "transformers_version": "5.19.0"}
    assert read(LLAMA) == read(
        LLAMA,
        without=old_fields,
        rope_parameters={**LLAMA3_SCALING, "rope_theta": 500000.0},
        **new,
    )
    assert read(QWEN2) == read(
        QWEN2,
        without=old_fields,
        rope_parameters={"rope_type": "default", "rope_theta": 10000},
        layer_types=["full_attention"] * 28,
        sliding_window=None,
        **new,
    )


def test_defaults_of_absent_fields(read):
    assert read(LLAMA, without=("head_dim",)).head_dim == 3072 // 24
    assert read(LLAMA, without=("num_key_value_heads",)).num_query_groups == 24
    assert read(LLAMA, without=("tie_word_embeddings",)).tied_embeddings is False
    assert read(LLAMA, head_dim=None).head_dim == 128


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
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


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
def test_other_ropes_are_refused(read, kind):
    for scaling in ({"type": kind, "factor": 2.0}, {"rope_type": kind, "factor": 2.0}):
        with pytest.raises(InputError, match=f"rope type '{kind}' is not supported"):
            read(LLAMA, rope_scaling=scaling)


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
    with pytest.raises(InputError, match="not valid JSON"):
        read_model_config(tmp_path)
