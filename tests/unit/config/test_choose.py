"""Layouts that `plan --layouts` proposes: which fit, in what order, counted by what."""

import itertools
from dataclasses import replace

import pytest

from megatron_rl.choose import Machine, active_parameters, choices, cost_of
from megatron_rl.config import RunConfig
from megatron_rl.fit import free_on_planned, is_possible, typed
from megatron_rl.weights.arch import MixtureArch, ModelArch

QWEN_7B = ModelArch(
    model_type="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    head_dim=128,
    vocab_size=152064,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    max_position_embeddings=131072,
    qkv_bias=True,
    tied_embeddings=False,
)
SMALL = replace(
    QWEN_7B,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=512,
)
UNIT = Machine(operations=1.0, inside=1.0, between=0.5, node=2)


def recipe(response=1024, **parallel):
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "none", "num_iterations": 1},
            "model": {"path": "none", "dtype": "bfloat16", "layer_spec": "transformer_engine"},
            "prompts": {"path": "none", "prompts_per_iteration": 16, "max_prompt_tokens": 24},
            "rollout": {"engine": "vllm", "group_size": 2, "max_response_tokens": response},
            "batching": {"max_tokens_per_microbatch": 2 * (response + 24)},
            "algorithm": {"preset": "grpo"},
            "parallel": parallel,
        }
    )


def cost(world, arch=SMALL, **parallel):
    return cost_of(recipe(response=1000, **parallel), arch, world, UNIT)


def test_operations_of_a_small_model_by_hand():
    """32 sequences of 1,024 tokens; three times a forward, half of all pairs attended."""
    layer = 64 * (2 * 64 + 2 * 32) + (64 + 2 * 32) + 2 * 64 + 3 * 64 * 128
    parameters = 2 * layer + 2 * 512 * 64 + 64
    a_token = 2 * parameters + 4 * 64 * 512 * 2
    assert cost(1).computing == 3 * a_token * 32 * 1024
    assert cost(1).total == cost(1).computing  # a lone rank waits for nobody
    assert cost(2, tensor_model_parallel_size=2).computing == cost(1).computing / 2
    assert cost(2).computing == cost(1).computing / 2


def test_bytes_that_ranks_exchange_by_hand():
    """Ten exchanges a layer of 64 numbers a token, half of which are another rank's."""
    tokens = 32 * 1024
    tensor = cost(2, tensor_model_parallel_size=2, sequence_parallel=True).tensor
    assert tensor == 10 * 2 * tokens * 64 * 2 / 2
    context = cost(2, context_parallel_size=2).context
    assert context == 3 * 2 * tokens * (2 * 32 * 2) / 2
    over_nodes = cost(4, tensor_model_parallel_size=2, context_parallel_size=2)
    # Keys of one rank in two, over a link of half the speed.
    assert over_nodes.context == context / 2 / 0.5
    assert cost(2).replicas == (4 + 2) * SMALL.num_parameters / 2


def test_stages_wait_at_both_ends():
    """Sixteen rows of two sequences: one more row's time at two stages."""
    staged = cost(2, pipeline_model_parallel_size=2)
    assert staged.pipeline == staged.computing / 16


def test_the_stage_with_most_layers_is_waited_for():
    """Three layers on two ranks, the first of which has two: two thirds of the operations."""
    three = replace(SMALL, num_layers=3)
    uneven = {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2}
    alone, staged = cost(1, arch=three), cost(2, arch=three, **uneven)
    assert staged.computing == pytest.approx(alone.computing * 2 / 3, rel=1e-12)


def test_stages_that_do_not_divide_the_layers_are_proposed_as_what_can_be_typed():
    """31 layers is a prime, so without uneven stages no pipeline could be proposed."""
    found = first(400, recipe(response=8168), replace(QWEN_7B, num_layers=31), 8)
    staged = [choice for choice in found if choice.layout.pp > 1]
    assert {choice.layout.pp for choice in staged} >= {2, 4, 8}
    for choice in staged:
        assert len(set(map(len, choice.layout.layers_of(31)))) > 1
        sizes = [name for name in choice.settings if "layers_in" in name or "account_for" in name]
        assert sizes


def test_a_token_meets_the_experts_that_it_is_sent_to():
    mixture = MixtureArch(num_experts=8, ffn_hidden_size=32, top_k=2, renormalized=True)
    arch = replace(SMALL, mixture=mixture)
    assert active_parameters(arch) == arch.num_parameters - 2 * 6 * 3 * 64 * 32
    assert active_parameters(SMALL) == SMALL.num_parameters


def first(count, config, arch, world, gib=79.6):
    return list(itertools.islice(choices(config, arch, world, free_on_planned(gib)), count))


def test_what_is_proposed_fits_is_possible_and_comes_by_cost():
    config = recipe(response=8168)
    found = first(6, config, QWEN_7B, 16)
    costs = [choice.cost.total for choice in found]
    assert costs == sorted(costs)
    assert len({choice.layout for choice in found}) == len(found) == 6
    for choice in found:
        assert choice.fit.share <= 1
        values = config.model_dump()
        for name, value in choice.settings.items():
            section, field = name.split(".")
            values[section][field] = value
        typed_in = RunConfig.model_validate(values)
        assert typed_in.parallel.layout(16) == choice.layout
        assert is_possible(typed_in, QWEN_7B, 16)
        assert all(typed(value) for value in choice.settings.values())


def test_a_smaller_gpu_takes_another_layout_and_none_may_be_left():
    config = recipe(response=8168)
    ample, scarce = (first(1, config, QWEN_7B, 8, gib)[0] for gib in (400, 40))
    assert ample.layout.dp == 8  # nothing is cut that need not be
    assert "model.recompute_granularity" not in ample.settings
    assert scarce.layout != ample.layout or "model.recompute_granularity" in scarce.settings
    assert first(1, config, QWEN_7B, 8, 2) == []


@pytest.mark.parametrize(("response", "shared"), [(8168, False), (32744, True)])
def test_ranks_share_sequences_only_where_these_are_long(response, shared):
    found = first(100, recipe(response=response), QWEN_7B, 8)
    assert any(choice.layout.cp > 1 for choice in found) == shared


def test_what_the_recipe_has_of_a_layout_is_not_kept():
    """Ten stages do not divide 28 layers, and eight GPUs are no multiple of them."""
    config = recipe(response=1000, pipeline_model_parallel_size=10)
    (choice,) = first(1, config, QWEN_7B, 8, 400)
    assert choice.settings["parallel.pipeline_model_parallel_size"] == 1


def test_an_engine_lies_on_several_nodes_only_where_none_of_one_holds_the_model():
    """256 wide experts a layer: 1.3 TB of weights, of which eight GPUs have room for a half."""
    mixture = MixtureArch(num_experts=256, ffn_hidden_size=8192, top_k=4, renormalized=True)
    arch = replace(QWEN_7B, model_type="qwen3_moe", qkv_bias=False, qk_norm=True, mixture=mixture)
    arch = replace(arch, num_attention_heads=32, num_query_groups=32)
    (large,) = first(1, recipe(), arch, 256)
    assert arch.num_parameters * 2 > 8 * 79.6 * 2**30
    assert large.settings["rollout.tensor_model_parallel_size"] == 32
    (small,) = first(1, recipe(), QWEN_7B, 256)
    assert small.config.rollout.tensor_model_parallel_size <= 8
