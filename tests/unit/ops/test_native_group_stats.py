import math

import pytest
import torch

from megatron_rl.ops.group_stats import (
    GROUP_ADVANTAGES,
    KEEP_RULES,
    group_stats,
    group_stats_definition,
)

pytestmark = pytest.mark.usefixtures("native_only")
ops = torch.ops.megatron_rl


def fields(stats):
    return {name: getattr(stats, name) for name in stats.__slots__}


def assert_same(rewards, offsets, **settings):
    actual = fields(group_stats(rewards, offsets, **settings))
    for name, expected in fields(group_stats_definition(rewards, offsets, **settings)).items():
        torch.testing.assert_close(
            actual[name], expected, atol=0, rtol=1e-15, equal_nan=True, msg=name
        )


@pytest.fixture(scope="module")
def ragged():
    """Rewards and offsets of 100,000 groups."""
    torch.manual_seed(0)
    sizes = torch.randint(0, 12, (100_000,))
    offsets = torch.cat([torch.zeros(1).long(), sizes.cumsum(0)])
    rewards = torch.randn(int(offsets[-1])).double()
    rewards[torch.rand(len(rewards)) < 0.4] = 0.1  # many groups of equal rewards
    rewards[::1001] = math.nan
    rewards[5::1003] = -math.inf
    return rewards, offsets


@pytest.mark.parametrize("std_ddof", [0, 1, 3])
def test_equals_the_definition_on_100_000_ragged_groups(ragged, std_ddof):
    assert_same(*ragged, std_ddof=std_ddof)


@pytest.mark.parametrize("rule", KEEP_RULES)
def test_keeps_what_the_definition_keeps(ragged, rule):
    assert_same(*ragged, keep=[rule])


@pytest.mark.parametrize("advantage", GROUP_ADVANTAGES)
def test_advantages_are_the_definitions(ragged, advantage):
    assert_same(*ragged, advantage=advantage, std_eps=1e-6)


@pytest.mark.parametrize(
    "advantage",
    [
        "reward_minus_mean",
        "group_norm",
        "leave_one_out",
        "reward_over_std",
        "reward_minus_mean_over_p",
    ],
)
def test_groups_of_equal_rewards_have_exactly_no_advantage(ragged, advantage):
    rewards, offsets = ragged
    stats = group_stats(rewards, offsets, advantage=advantage, std_eps=0.0)
    is_uniform = (stats.all_equal & (stats.counts > 1) & stats.mean.isfinite()).repeat_interleave(
        stats.counts
    )
    assert is_uniform.sum() > 1000
    is_zero = stats.advantages[is_uniform] == 0
    assert not is_zero.any() if advantage == "reward_over_std" else is_zero.all()


def test_no_groups_and_empty_groups():
    assert_same(torch.zeros(0).double(), torch.zeros(1).long())
    assert_same(torch.zeros(0).double(), torch.zeros(5).long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rewards_of_any_type(dtype):
    assert_same(torch.randn(12).to(dtype), torch.tensor([0, 5, 12]))


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
def test_equal_rewards_have_exactly_no_advantage(reward):
    rewards = torch.full((24,), reward).double()
    stats = group_stats(rewards, torch.tensor([0, 8, 24]))
    assert (rewards[:8] - stats.mean[0] == 0).all()
    assert stats.std.tolist() == [0.0, 0.0]
    assert stats.all_equal.all()


def test_an_error_names_argument_expected_and_actual():
    rewards = torch.zeros(3).double()
    with pytest.raises(RuntimeError, match="offsets: expected int64, got float32"):
        ops.group_stats(rewards, torch.zeros(2), 1, 0, 0, 0.0)
    with pytest.raises(RuntimeError, match=r"rewards: expected float64, got float32"):
        ops.group_stats(rewards.float(), torch.tensor([0, 3]), 1, 0, 0, 0.0)
    with pytest.raises(RuntimeError, match=r"offsets: .* ascend from 0 to 3, got 1 after 2"):
        ops.group_stats(rewards, torch.tensor([0, 2, 1, 3]), 1, 0, 0, 0.0)
    with pytest.raises(RuntimeError, match="keep_rules: expected bits of 7, got 8"):
        ops.group_stats(rewards, torch.tensor([0, 3]), 1, 8, 0, 0.0)
    with pytest.raises(RuntimeError, match="advantage_mode: expected 0 up to 6, got 7"):
        ops.group_stats(rewards, torch.tensor([0, 3]), 1, 0, 7, 0.0)


def test_schema_and_fake_agree_with_the_op():
    rewards, offsets = torch.randn(5).double(), torch.tensor([0, 2, 5])
    torch.library.opcheck(ops.group_stats, (rewards, offsets, 1, 7, 4, 1e-6))
