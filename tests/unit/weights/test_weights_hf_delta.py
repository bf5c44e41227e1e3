"""The gated delta nets of a config.json, and what of them is refused."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from hub_configs import QWEN3_5, QWEN3_5_MOE
from safetensors.torch import save_file
from weights_models import ARCHS, hf_tensors

from megatron_rl.errors import InputError
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.hf_files import HfCheckpoint
from megatron_rl.weights.layouts import hf_shapes, is_behind

EVERY_FOURTH = frozenset(range(3, 64, 4))


@pytest.fixture
def read(tmp_path):
    def read(config=QWEN3_5, without=(), **changes):
        config = {k: v for k, v in {**config, **changes}.items() if k not in without}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_model_config(tmp_path)

    return read


def test_qwen3_5_is_read(read):
    arch = read()
    delta = arch.delta
    assert (delta.num_key_heads, delta.num_value_heads) == (16, 48)
    assert (delta.key_dim, delta.value_dim, delta.kernel) == (128, 128, 4)
    assert delta.attention_layers == EVERY_FOURTH
    assert (arch.num_attention_layers, arch.has_attention(3), arch.has_attention(4)) == (
        16,
        True,
        False,
    )
    assert (arch.rotary_dim, arch.head_dim, arch.rope_theta) == (64, 256, 1e7)
    assert arch.has_gates
    # 27B: by hand, of the published sizes.
    mixed = 2 * 16 * 128 + 48 * 128
    net = 5120 * (mixed + 48 * 128 + 2 * 48 + 48 * 128) + 4 * mixed + 2 * 48 + 128
    attention = 5120 * 256 * (2 * 24 + 2 * 4 + 24) + 2 * 256
    others = 64 * (3 * 5120 * 17408 + 2 * 5120) + 5120 + 2 * 248320 * 5120
    assert arch.num_parameters == 48 * net + 16 * attention + others
    assert arch.described.endswith(" (without 1 behind the last layer, for guessing ahead)")


def test_what_transformers_takes_for_absent_fields(read):
    from transformers import Qwen3_5TextConfig

    optional = (
        *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_key_heads"),
        *("linear_value_head_dim", "linear_num_value_heads", "full_attention_interval"),
        *("layer_types", "head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps"),
        *("tie_word_embeddings", "attn_output_gate", "partial_rotary_factor"),
    )
    arch = read(without=optional)
    theirs = Qwen3_5TextConfig(**{k: v for k, v in QWEN3_5.items() if k not in optional})
    delta = arch.delta
    assert delta.num_key_heads == theirs.linear_num_key_heads
    assert delta.num_value_heads == theirs.linear_num_value_heads
    assert (delta.key_dim, delta.value_dim) == (
        theirs.linear_key_head_dim,
        theirs.linear_value_head_dim,
    )
    assert delta.kernel == theirs.linear_conv_kernel_dim
    kinds = ["full_attention" if arch.has_attention(n) else "linear_attention" for n in range(64)]
    assert kinds == theirs.layer_types
    assert (arch.head_dim, arch.num_query_groups) == (theirs.head_dim, theirs.num_key_value_heads)
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"]
    share = theirs.rope_parameters["partial_rotary_factor"]
    assert arch.rotary_dim == arch.head_dim * share
    assert arch.rms_norm_eps == theirs.rms_norm_eps
    assert arch.tied_embeddings == theirs.tie_word_embeddings


def test_qwen3_5_moe_is_read(read):
    arch = read(QWEN3_5_MOE)
    mixture = arch.mixture
    assert (mixture.num_experts, mixture.top_k, mixture.ffn_hidden_size) == (256, 8, 512)
    assert (mixture.shared_ffn_hidden_size, mixture.has_shared_gate) == (512, True)
    assert (mixture.renormalized, mixture.score, mixture.dense_layers) == (
        True,
        "softmax",
        frozenset(),
    )
    # 35B: by hand, of the published sizes.
    mixed = 2 * 16 * 128 + 32 * 128
    net = 2048 * (mixed + 32 * 128 + 2 * 32 + 32 * 128) + 4 * mixed + 2 * 32 + 128
    attention = 2048 * 256 * (2 * 16 + 2 * 2 + 16) + 2 * 256
    experts = 256 * (3 * 2048 * 512 + 2048) + 3 * 2048 * 512 + 2048
    others = 40 * (experts + 2 * 2048) + 2048 + 2 * 248320 * 2048
    assert arch.num_parameters == 30 * net + 10 * attention + others
    # A field that no layer of the model reads.
    assert read(QWEN3_5_MOE, intermediate_size=512) == arch


def test_what_transformers_takes_for_absent_fields_of_a_mixture(read):
    from transformers import Qwen3_5MoeTextConfig

    optional = (
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_key_value_heads"),
        *("shared_expert_intermediate_size", "layer_types", "full_attention_interval", "head_dim"),
        *("linear_num_value_heads", "linear_num_key_heads", "rope_parameters", "rms_norm_eps"),
    )
    arch = read(QWEN3_5_MOE, without=optional)
    theirs = Qwen3_5MoeTextConfig(
        **{k: v for k, v in QWEN3_5_MOE.items() if k not in (*optional, "partial_rotary_factor")}
    )
    mixture, delta = arch.mixture, arch.delta
    assert (mixture.num_experts, mixture.top_k) == (theirs.num_experts, theirs.num_experts_per_tok)
    assert mixture.ffn_hidden_size == theirs.moe_intermediate_size
    assert mixture.shared_ffn_hidden_size == theirs.shared_expert_intermediate_size
    assert (arch.num_query_groups, arch.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert (delta.num_key_heads, delta.num_value_heads) == (
        theirs.linear_num_key_heads,
        theirs.linear_num_value_heads,
    )
    assert (arch.rope_theta, arch.rms_norm_eps) == (
        theirs.rope_parameters["rope_theta"],
        theirs.rms_norm_eps,
    )
    assert arch.rotary_dim == arch.head_dim * theirs.rope_parameters["partial_rotary_factor"]
    kinds = ["full_attention" if arch.has_attention(n) else "linear_attention" for n in range(40)]
    assert kinds == theirs.layer_types


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_topk_prob": False}, r"norm_topk_prob=False is not supported.*only \(True,\)"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0 must be a pos"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size=None must be a positive whole"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok=300 is more than num_experts=256"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 with probabilities"),
        ({"num_local_experts": 256}, "num_local_experts=256 is not supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported.*only \(1,\)"),
        ({"n_shared_experts": 2}, "n_shared_experts=2 is not supported"),
        ({"architectures": ["Qwen3_5ForCausalLM"]}, "that generates text is"),
    ],
)
def test_what_a_mixture_would_ignore_is_refused(read, changes, message):
    with pytest.raises(InputError, match=message):
        read(QWEN3_5_MOE, **changes)


@pytest.mark.parametrize("without", ["layer_types", "full_attention_interval"])
def test_either_field_says_which_layers_have_attention(read, without):
    assert read(without=(without,)) == read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 40}, "linear_num_key_heads=16 must divide linear_num_value_"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim=0 must be a positive whole number"),
        ({"linear_conv_kernel_dim": "4"}, "linear_conv_kernel_dim='4' must be a positive whole"),
        ({"full_attention_interval": 2}, "layer_types and full_attention_interval=2 mean other"),
        ({"layer_types": ["full_attention"] * 63}, "must be 64 times 'linear_attention' or"),
        ({"layer_types": "linear_attention"}, "must be 64 times 'linear_attention' or"),
        ({"layer_types": ["sliding_attention"] * 64}, "must be 64 times 'linear_attention' or"),
        (
            {"layer_types": ["linear_attention"] * 64, "full_attention_interval": None},
            "no layer has attention",
        ),
        ({"mtp_num_hidden_layers": -1}, "mtp_num_hidden_layers=-1 must be a positive whole"),
        ({"attn_output_gate": False}, r"attn_output_gate=False is not supported.*only \(True,\)"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid' is not supported"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16' is not supported"),
        ({"attention_bias": True}, r"attention_bias=True is not supported.*only \(False,\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"num_experts": 8}, "num_experts=8 is not supported.*the field is not known"),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5, and 0.25 in rope_parameters",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0}},
            "rope type 'yarn' is not supported: default are",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "base": 3}},
            "rope of type 'default' has base=3",
        ),
    ],
)
def test_what_nobody_builds_or_would_be_ignored_is_refused(read, changes, message):
    with pytest.raises(InputError, match=message):
        read(**changes)


def test_what_guesses_tokens_ahead_is_left_out_where_config_json_says_it_is_there(tmp_path):
    arch = ARCHS["qwen3_5"]
    tensors = hf_tensors(arch) | {"mtp.fc.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 not known \['mtp.fc.weight'\]"):
        HfCheckpoint(tmp_path, hf_shapes(arch), partial(is_behind, arch))
    behind = replace(arch, layers_behind=1)
    found = HfCheckpoint(tmp_path, hf_shapes(behind), partial(is_behind, behind))
    assert found.dtypes.keys() == hf_shapes(arch).keys()
