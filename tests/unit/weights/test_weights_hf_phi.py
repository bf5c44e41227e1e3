"""Fields of Phi-3 to Phi-4: honoured, or refused by name."""

import math

import pytest
from hub_configs import PHI4, PHI4_MINI

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import LongRope

LONG = PHI4_MINI["rope_scaling"]
AUTO_MAP = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}


def test_phi_4_is_read(read):
    arch = read(PHI4)
    assert (arch.num_layers, arch.hidden_size, arch.ffn_hidden_size) == (40, 5120, 17920)
    assert (arch.num_attention_heads, arch.num_query_groups, arch.head_dim) == (40, 10, 128)
    assert (arch.rotary_dim, arch.long_rope, arch.yarn) == (None, None, None)
    assert (arch.rope_theta, arch.max_position_embeddings) == (250000.0, 16384)
    assert not arch.qkv_bias
    assert not arch.tied_embeddings


def test_phi_4_mini_is_read(read):
    """Positions end where its other factors begin, at 4096 of 131072: 32 times as many."""
    arch = read(PHI4_MINI)
    assert arch.num_parameters == 3_836_021_760
    assert (arch.rotary_dim, arch.max_position_embeddings) == (96, 4096)
    assert arch.long_rope == LongRope(
        positions=4096,
        factors=tuple(LONG["short_factor"]),
        amplitude=math.sqrt(1 + math.log(32) / math.log(4096)),
    )
    assert arch.long_rope.amplitude == pytest.approx(1.1902380714238083)
    assert arch.described == (
        "phi3, 3,836,021,760 parameters (in texts of up to 4,096 tokens, behind which its rope has "
        "other factors)"
    )


def test_a_context_that_is_not_stretched_has_no_amplitude(read):
    arch = read(PHI4_MINI, max_position_embeddings=2048)
    assert (arch.long_rope.amplitude, arch.max_position_embeddings) == (1.0, 2048)


OPTIONAL = (
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "sliding_window",
)


@pytest.mark.parametrize(
    ("name", "absent"),
    [(name, field) for name in ("phi4", "phi4_mini") for field in OPTIONAL],
)
def test_an_absent_field_is_what_transformers_takes(read, tmp_path, name, absent):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PHI4 if name == "phi4" else PHI4_MINI
    changes = {}
    if (name, absent) == ("phi4_mini", "partial_rotary_factor"):
        changes["rope_scaling"] = {"type": "longrope"} | {
            factors: [2.0] * 64 for factors in ("short_factor", "long_factor")
        }
    arch = read(config, without=(absent,), **changes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert arch.num_query_groups == theirs.num_key_value_heads
    assert arch.rms_norm_eps == theirs.rms_norm_eps
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"]
    assert arch.tied_embeddings == theirs.tie_word_embeddings
    share = theirs.rope_parameters["partial_rotary_factor"]
    assert (arch.rotary_dim or arch.head_dim) == int(share * arch.head_dim)
    if name == "phi4_mini":
        _, amplitude = ROPE_INIT_FUNCTIONS["longrope"](theirs)
        assert arch.long_rope.amplitude == amplitude
        assert arch.max_position_embeddings == theirs.original_max_position_embeddings


@pytest.mark.parametrize(
    "told",
    [
        {"auto_map": AUTO_MAP},
        {"auto_map": {**AUTO_MAP, "AutoTokenizer": "Xenova/gpt-4o"}},
        {"sliding_window": 16384},  # as wide as the model has positions
        {"sliding_window": 262144},
        {"partial_rotary_factor": 1.0},
        {"original_max_position_embeddings": 4096},  # of a rope that is not scaled
    ],
)
def test_what_changes_nothing_passes(read, told):
    assert read(PHI4, **told) == read(PHI4)


def test_the_factor_that_the_positions_give_may_be_said(read):
    assert read(PHI4_MINI, rope_scaling=LONG | {"factor": 32.0}) == read(PHI4_MINI)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": "2047"}, "sliding_window='2047' must be a positive whole number"),
        ({"layer_types": ["sliding_attention"] * 40}, "layer_types=.* only full_attention is"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"lm_head_bias": True}, "lm_head_bias=True is not supported"),
        ({"resid_pdrop": 0.1}, "resid_pdrop=0.1 is not supported"),
        ({"embd_pdrop": 0.1}, "embd_pdrop=0.1 is not supported"),
        ({"full_attn_mod": 2}, "full_attn_mod=2 is not supported"),
        ({"interpolate_factor": 2}, "interpolate_factor=2 is not supported"),
        ({"auto_map": {"AutoConfig": "own.Config"}}, "auto_map=.* is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"partial_rotary_factor": 0.7}, "turns 89 entries of a head of 128"),
        ({"model_type": "phi4mm"}, "model_type='phi4mm' is not supported: known are"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope type 'yarn' is not supported: default, longrope are",
        ),
        (
            {"rope_scaling": {"type": "su"} | {k: v for k, v in LONG.items() if k != "type"}},
            "rope type 'su' is not supported: default, longrope are",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(read, changes, message):
    with pytest.raises(InputError, match=message):
        read(PHI4, **changes)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"attention_factor": 1.0}, "has attention_factor=1.0, which is not known"),
        ({"short_mscale": 1.2}, "has short_mscale=1.2, which is not known"),
        ({"long_mscale": 1.2}, "has long_mscale=1.2, which is not known"),
        ({"factor": 16.0}, "factor=16.0, and by original_max_position_embeddings=4096 and"),
        (
            {"original_max_position_embeddings": 8192},
            "original_max_position_embeddings=8192, and by original_max_position_embeddings=4096",
        ),
        ({"short_factor": None}, "short_factor=None: it must be a list"),
        ({"long_factor": 2.0}, "long_factor=2.0: it must be a list"),
        ({"short_factor": [0.0] * 48}, "short_factor=0.0 must be a positive number"),
        ({"short_factor": ["1"] * 48}, "short_factor='1' must be a positive number"),
        ({"short_factor": [1.0] * 47}, "47 factors in short_factor and 48 in long_factor"),
        (
            {"short_factor": [1.0] * 64, "long_factor": [1.0] * 64},
            "has 64 factors, and 96 entries of a head turn in pairs",
        ),
    ],
)
def test_scalings_that_transformers_and_vllm_read_differently_are_refused(read, told, message):
    """transformers takes no mscale, vLLM no factor and no attention_factor."""
    with pytest.raises(InputError, match=message):
        read(PHI4_MINI, rope_scaling=LONG | told)


def test_a_context_of_one_token_is_refused(read):
    with pytest.raises(InputError, match="original_max_position_embeddings=1: no model has"):
        read(PHI4_MINI, original_max_position_embeddings=1)


def test_other_families_have_no_such_rope(read):
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    unknown = ("embd_pdrop", "resid_pdrop", "original_max_position_embeddings")
    with pytest.raises(InputError, match="rope type 'longrope' is not supported: default, llama3"):
        read(PHI4, without=unknown, **llama, rope_scaling=LONG)
    with pytest.raises(InputError, match="sliding_window=262144 is not supported for llama"):
        read(PHI4, without=unknown, **llama, sliding_window=262144)
