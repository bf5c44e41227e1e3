"""What settings mean where the policy itself samples."""

from dataclasses import replace

import pytest
from rollout_models import ARCH

from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.parallel.layout import Layout
from megatron_rl.rollout.config import RolloutConfig
from megatron_rl.rollout.engine_rules import engine_problems_of, unused_by_policy
from megatron_rl.rollout.kv_cache import policy_state_bytes, policy_token_bytes, sequence_bytes
from megatron_rl.weights.arch import DeltaArch, LatentArch, SlidingArch
from megatron_rl.weights.config import WeightSyncConfig

MODEL = ModelConfig(path="model", dtype="float32")


def fields(rollout: RolloutConfig, model=MODEL, **optimizer) -> list[str]:
    found = engine_problems_of(rollout, model, OptimizerConfig(**optimizer))
    return [str(problem).partition("=")[0] for problem in found]


def test_what_the_policy_as_engine_cannot_follow_is_refused_and_vllm_can():
    settings = {"dtype": "float16", "tensor_model_parallel_size": 2}
    te = ModelConfig(path="model", dtype="float32", layer_spec="transformer_engine")
    assert not fields(RolloutConfig(**settings), te, offload="weights")
    assert fields(RolloutConfig(engine="megatron", **settings), te, offload="weights") == [
        "rollout.dtype",
        "rollout.tensor_model_parallel_size",
        "optimizer.offload",
        "model.layer_spec",
    ]
    assert not fields(RolloutConfig(engine="megatron", dtype="float32"), offload="optimizer")


def test_what_has_no_effect_is_said():
    weights = WeightSyncConfig(bucket_mib=7)
    assert not list(unused_by_policy(RolloutConfig(enforce_eager=True), weights))
    assert not list(unused_by_policy(RolloutConfig(engine="megatron"), WeightSyncConfig()))
    policy = RolloutConfig(engine="megatron", enforce_eager=True)
    (line,) = unused_by_policy(policy, weights)
    assert line.startswith("weights.bucket_mib=7, rollout.enforce_eager=true have no effect: ")


def test_a_token_takes_keys_and_values_in_every_layer_of_the_rank_that_has_most():
    """6 layers over two stages: 3 on a rank. 4 key heads over TP 2: 2 on a rank."""
    arch = replace(ARCH, num_layers=6, num_attention_heads=8, num_query_groups=4, head_dim=8)
    layout = Layout(world_size=4, tp=2, pp=2)
    assert policy_token_bytes(arch, layout, itemsize=2) == 2 * 3 * 2 * 8 * 2
    assert sequence_bytes(arch, tokens=1, tp=2, itemsize=2) == 128 * 2 * 6 * 2 * 8 * 2
    alone = Layout(world_size=8, tp=8, pp=1)  # ranks beyond the heads have one each
    assert policy_token_bytes(arch, alone, itemsize=2) == 2 * 6 * 1 * 8 * 2


@pytest.mark.parametrize(
    ("near", "kept"),
    [((0, 1, 2, 4, 5), 6), ((0, 1, 3, 4), 6), ((0, 2, 4), 6), ((0, 1, 2, 3, 4, 5), 6), ((0, 1), 6)],
)
def test_vllm_keeps_layers_with_a_window_in_groups_of_one_size(near, kept):
    """5 + 1, 4 + 2, 3 + 3, 6 alone, 2 + 4; below, 5 + 2 (padded to 6 + 2) and 4 + 3 (to 4 + 4)."""
    arch = replace(ARCH, num_layers=6, sliding=SlidingArch(window=8, layers=frozenset(near)))
    of_layer = sequence_bytes(replace(ARCH, num_layers=1), tokens=300, tp=1, itemsize=2)
    assert sequence_bytes(arch, tokens=300, tp=1, itemsize=2) == kept * of_layer
    seven = replace(arch, num_layers=7, sliding=SlidingArch(window=8, layers=frozenset(range(5))))
    assert sequence_bytes(seven, tokens=300, tp=1, itemsize=2) == 8 * of_layer
    even = replace(seven, sliding=SlidingArch(window=8, layers=frozenset(range(4))))
    assert sequence_bytes(even, tokens=300, tp=1, itemsize=2) == 8 * of_layer


def test_of_latent_attention_vllm_keeps_one_vector_and_the_policy_every_head():
    """Values are 6 wide, and kept as wide as keys, 10."""
    latent = LatentArch(
        rank=12, query_rank=None, still_dim=8, turning_dim=2, value_dim=6, interleaved=True
    )
    arch = replace(
        ARCH,
        num_layers=6,
        num_attention_heads=8,
        num_query_groups=8,
        head_dim=latent.head_dim,
        latent=latent,
    )
    assert sequence_bytes(arch, tokens=129, tp=2, itemsize=2) == 256 * 6 * (12 + 2) * 2
    layout = Layout(world_size=4, tp=2, pp=2)
    assert policy_token_bytes(arch, layout, itemsize=2) == 2 * 3 * 4 * 10 * 2


def test_delta_nets_keep_states_of_a_sequence_however_long_it_is():
    """Layers 2 and 5 have attention; a state is in float32, three tokens before in 16 bits."""
    delta = DeltaArch(
        attention_layers=frozenset({2, 5}),
        num_key_heads=4,
        num_value_heads=8,
        key_dim=3,
        value_dim=5,
        kernel=4,
    )
    arch = replace(
        ARCH, num_layers=6, num_attention_heads=8, num_query_groups=4, head_dim=8, delta=delta
    )
    layout = Layout(world_size=4, tp=2, pp=2)
    of_net = (8 * 5 * 3 * 4 + 3 * (2 * 4 * 3 + 8 * 5) * 2) // 2  # a rank's
    assert policy_token_bytes(arch, layout, itemsize=2) == 2 * 1 * 2 * 8 * 2
    assert policy_state_bytes(arch, layout, itemsize=2) == 2 * of_net
    assert policy_state_bytes(ARCH, layout, itemsize=2) == 0
    keys = 128 * 2 * 2 * 2 * 8 * 2
    assert sequence_bytes(arch, tokens=1, tp=2, itemsize=2) == keys + 4 * of_net
