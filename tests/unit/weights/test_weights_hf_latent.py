"""Fields of models with latent attention: honoured, or refused by name."""

import pytest
from hub_configs import DEEPSEEK_V3, GLM4_MOE_LITE

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import LatentArch, MixtureArch, YarnRope

YARN = DEEPSEEK_V3["rope_scaling"]


def test_deepseek_v3_is_read(read):
    arch = read(DEEPSEEK_V3)
    assert arch.latent == LatentArch(
        rank=512,
        query_rank=1536,
        still_dim=128,
        turning_dim=64,
        value_dim=128,
        interleaved=True,
    )
    assert (arch.head_dim, arch.rotary_dim, arch.num_query_groups) == (192, 64, 128)
    assert arch.value_rows == 128 * 128
    assert arch.yarn == YarnRope(
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        amplitude=1.0,
        rounds_range=True,
        score_mscale=1.0,
    )
    assert arch.mixture == MixtureArch(
        num_experts=256,
        ffn_hidden_size=2048,
        top_k=8,
        renormalized=True,
        dense_layers=frozenset({0, 1, 2}),
        score="sigmoid",
        has_bias=True,
        scale=2.5,
        shared_ffn_hidden_size=2048,
        num_groups=8,
        chosen_groups=4,
    )
    assert arch.described.endswith(" (without 1 behind the last layer, for guessing ahead)")


def test_queries_without_a_latent_vector_are_read(read):
    arch = read(DEEPSEEK_V3, q_lora_rank=None)
    assert arch.latent.query_rank is None
    assert [name for name, _ in arch.latent_rows] == [
        "rows of the latent vector and turning entries of keys"
    ]


def test_halves_turn_where_neighbours_do_not(read):
    assert not read(DEEPSEEK_V3, rope_interleave=False).latent.interleaved


@pytest.mark.parametrize("groups", [(1, 1), (8, 8)])
def test_groups_that_are_all_chosen_are_none(read, groups):
    mixture = read(DEEPSEEK_V3, n_group=groups[0], topk_group=groups[1]).mixture
    assert (mixture.num_groups, mixture.chosen_groups) == (1, 1)


OPTIONAL = (
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "tie_word_embeddings",
    "norm_topk_prob",
)


@pytest.mark.parametrize(
    ("config", "absent"),
    [
        *((DEEPSEEK_V3, name) for name in (*OPTIONAL, "n_group", "topk_group")),
        (DEEPSEEK_V3, "first_k_dense_replace"),
        *((GLM4_MOE_LITE, name) for name in OPTIONAL),
    ],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)
def test_an_absent_field_is_what_transformers_takes(read, tmp_path, config, absent):
    from transformers import AutoConfig

    arch = read(config, without=(absent,))
    theirs = AutoConfig.from_pretrained(tmp_path)
    latent, mixture = arch.latent, arch.mixture
    assert latent == LatentArch(
        rank=theirs.kv_lora_rank,
        query_rank=theirs.q_lora_rank,
        still_dim=theirs.qk_nope_head_dim,
        turning_dim=theirs.qk_rope_head_dim,
        value_dim=theirs.v_head_dim,
        interleaved=theirs.rope_interleave,
    )
    assert arch.num_query_groups == theirs.num_key_value_heads
    assert arch.rms_norm_eps == theirs.rms_norm_eps
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"]
    assert arch.tied_embeddings == theirs.tie_word_embeddings
    assert mixture.num_experts == theirs.n_routed_experts
    assert mixture.top_k == theirs.num_experts_per_tok
    assert mixture.scale == theirs.routed_scaling_factor
    assert mixture.shared_ffn_hidden_size == theirs.n_shared_experts * theirs.moe_intermediate_size
    assert (mixture.num_groups, mixture.chosen_groups) == (theirs.n_group, theirs.topk_group)
    assert theirs.norm_topk_prob
    dense = getattr(theirs, "first_k_dense_replace", 1)
    assert mixture.dense_layers == frozenset(range(dense))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        (DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        (DEEPSEEK_V3, {"norm_topk_prob": False}, "norm_topk_prob=False is not supported"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias=True is not supported"),
        (DEEPSEEK_V3, {"index_topk": 2048}, "index_topk=2048 is not supported.*not known"),
        (DEEPSEEK_V3, {"auto_map": {"AutoModel": "own.Model"}}, "auto_map=.* is not supported"),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, "num_key_value_heads=8 must be 128"),
        (DEEPSEEK_V3, {"head_dim": 192}, "head_dim=192 must be 64"),
        (DEEPSEEK_V3, {"qk_head_dim": 128}, "qk_head_dim=128 must be 192"),
        (DEEPSEEK_V3, {"qk_rope_head_dim": 63}, "qk_rope_head_dim=63 must be even"),
        (DEEPSEEK_V3, {"v_head_dim": 256}, "v_head_dim=256 is more than qk_nope_head_dim"),
        (DEEPSEEK_V3, {"kv_lora_rank": None}, "kv_lora_rank=None must be a positive whole number"),
        (DEEPSEEK_V3, {"rope_interleave": None}, "rope_interleave=None must be true or false"),
        (DEEPSEEK_V3, {"n_group": 3}, "n_group=3 and topk_group=4: groups of at least two"),
        (DEEPSEEK_V3, {"topk_group": 9}, "topk_group=9: groups of at least two"),
        (DEEPSEEK_V3, {"n_group": 256, "topk_group": 8}, "n_group=256 and topk_group=8: groups of"),
        (DEEPSEEK_V3, {"topk_group": 2}, "ranks a group by its 4 best experts, transformers and"),
        (GLM4_MOE_LITE, {"n_group": 8}, r"n_group=8 is not supported.*only \(1,\)"),
        (GLM4_MOE_LITE, {"first_k_dense_replace": 2}, "None and first_k_dense_replace=2 differ"),
        (
            GLM4_MOE_LITE,
            {"mlp_layer_types": ["sparse"] * 47},
            r"mlp_layer_types=\['sparse'.* and first_k_dense_replace=1 differ: vLLM asks",
        ),
        (GLM4_MOE_LITE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supp"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(read, config, changes, message):
    with pytest.raises(InputError, match=message):
        read(config, **changes)


@pytest.mark.parametrize("name", ["scoring_func", "topk_method"])
def test_what_vllm_takes_for_an_absent_field_is_refused(read, name):
    """transformers does not ask them: without them the engine would run another router."""
    with pytest.raises(InputError, match=rf"{name}=.* \(so vLLM takes an absent field\)"):
        read(DEEPSEEK_V3, without=(name,))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"attention_factor": 1.0}, "has attention_factor=1.0, which is not known"),
        ({"truncate": False}, "has truncate=False, which is not known"),
        ({"mscale": None}, "mscale=None and mscale_all_dim=1.0: with one of them alone"),
        ({"mscale_all_dim": None}, "mscale=1.0 and mscale_all_dim=None: with one of them alone"),
        ({"type": "llama3"}, "rope type 'llama3' is not supported: default, yarn are"),
    ],
)
def test_ropes_that_transformers_and_vllm_read_differently_are_refused(read, told, message):
    with pytest.raises(InputError, match=message):
        read(DEEPSEEK_V3, rope_scaling=YARN | told)


def test_scores_are_scaled_only_where_the_rope_says_so(read):
    plain = {name: value for name, value in YARN.items() if "mscale" not in name}
    assert read(DEEPSEEK_V3, rope_scaling=plain).yarn.score_mscale == 0
    assert read(DEEPSEEK_V3, rope_scaling=YARN | {"mscale_all_dim": 0.7}).yarn.score_mscale == 0.7


def test_a_name_that_nobody_knows_has_a_way_out(read):
    with pytest.raises(InputError, match="write model_type=deepseek_v3, since transformers 5"):
        read(DEEPSEEK_V3, model_type="kimi_k2")
