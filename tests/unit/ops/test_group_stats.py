import math
from fractions import Fraction

import pytest
import torch

from megatron_rl.ops.group_stats import GROUP_ADVANTAGES, KEEP_RULES, group_stats


def stats_of(*groups, **settings):
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    offsets = torch.tensor([0, *[len(group) for group in groups]]).cumsum(0)
    return group_stats(rewards, offsets, **settings)


def test_ragged_groups_match_hand_calculation():
    stats = stats_of([1.0, -1.0, -1.0, -1.0], [1.0, 1.0], [-1.0], [])
    assert stats.mean.tolist() == [-0.5, 1.0, -1.0, 0.0]
    # deviations 1.5, 0.5, 0.5, 0.5: squares sum to 3; sample variance 1
    assert stats.std.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert stats.max.tolist() == [1.0, 1.0, -1.0, -math.inf]
    assert stats.min.tolist() == [-1.0, 1.0, -1.0, math.inf]
    assert stats.counts.tolist() == [4, 2, 1, 0]
    assert stats.all_equal.tolist() == [False, True, True, False]
    assert stats.all_correct.tolist() == [False, True, False, False]
    assert stats.all_wrong.tolist() == [False, False, True, False]
    assert stats.single.tolist() == [False, False, True, False]
    assert not stats.has_nan.any()


def test_population_std():
    stats = stats_of([1.0, -1.0, -1.0, -1.0], [0.5], std_ddof=0)
    assert stats.std.tolist() == pytest.approx([math.sqrt(0.75), 1.0])


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, 1e-30, -0.3])
@pytest.mark.parametrize("size", [2, 3, 8, 16, 17])
def test_equal_rewards_have_exactly_no_spread(reward, size):
    stats = stats_of([reward] * size)
    assert stats.std.item() == 0.0
    assert stats.mean.item() == reward


def test_a_small_spread_on_a_large_mean_survives():
    stats = stats_of([1e6, 1e6 + 1e-3])  # a variance from squares would be noise
    assert stats.std.item() == pytest.approx(1e-3 / math.sqrt(2), rel=1e-6)


def test_nan_stays_in_its_group():
    stats = stats_of([1.0, math.nan], [1.0, -1.0])
    assert stats.has_nan.tolist() == [True, False]
    assert stats.mean[1].item() == 0.0
    assert stats.mean[0].isnan()
    assert not stats.all_correct[0]
    assert not stats.all_wrong[0]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((), [1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (("positive",), [0, 1, 0, 1, 0, 0, 1, 1, 0]),
        (("drop_all_wrong",), [1, 1, 1, 1, 0, 0, 1, 1, 1]),
        (("drop_all_correct",), [1, 1, 1, 1, 1, 1, 0, 0, 0]),
        (("drop_uniform",), [1, 1, 1, 1, 0, 0, 0, 0, 0]),
        (("drop_all_correct", "positive"), [0, 1, 0, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_what_the_rules_keep(rules, expected):
    # mixed, with two that are best; all wrong, since 0 is; all correct, two of them best
    stats = stats_of([0.5, 1.0, -1.0, 1.0], [0.0, -1.0], [1.0, 1.0, 0.5], keep=rules)
    assert stats.keep.int().tolist() == expected


@pytest.mark.parametrize("rule", [(), *((rule,) for rule in KEEP_RULES)])
def test_nothing_of_a_group_with_nan_is_kept(rule):
    stats = stats_of([1.0, math.nan, -1.0], [1.0, -1.0], keep=rule)
    assert not stats.keep[:3].any()
    assert stats.keep[3]


@pytest.mark.parametrize("advantage", ["reward_minus_mean", "group_norm"])
def test_nan_makes_no_number_of_its_group(advantage):
    stats = stats_of([1.0, math.nan], [1.0, -1.0], advantage=advantage)
    assert stats.advantages[:2].isnan().all()
    assert stats.advantages[2] == -stats.advantages[3] != 0


@pytest.mark.parametrize("advantage", ["reward_minus_mean", "group_norm", "leave_one_out"])
@pytest.mark.parametrize("std_eps", [0.0, 1e-6])
def test_equal_rewards_have_exactly_no_advantage(advantage, std_eps):
    stats = stats_of([0.1] * 7, [1 / 3] * 3, advantage=advantage, std_eps=std_eps)
    assert stats.advantages.tolist() == [0.0] * 10


@pytest.mark.parametrize("advantage", GROUP_ADVANTAGES)
@pytest.mark.parametrize("std_ddof", [0, 1])
def test_advantages_equal_exact_arithmetic(advantage, std_ddof):
    torch.manual_seed(0)
    sizes = [1, 2, 3, 8, 33, 0, 70, 1, 2]
    groups = [torch.randn(size).double().tolist() for size in sizes]
    groups += [[0.1] * 7, [1.0, -1.0, -1.0, 1.0]]
    stats = stats_of(*groups, advantage=advantage, std_ddof=std_ddof, std_eps=1e-3)
    expected = [
        exact_advantage(advantage, group, index, std_ddof, 1e-3)
        for group in groups
        for index in range(len(group))
    ]
    # a mean of 70 rewards near 1 is off by 1e-15, and a small advantage by that
    assert stats.advantages.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-14)


def exact_advantage(name, group, index, std_ddof, std_eps):
    """By rational numbers, up to one square root."""
    rewards = [Fraction(reward) for reward in group]
    own, count = rewards[index], len(rewards)
    mean = sum(rewards) / count
    others = [reward for j, reward in enumerate(rewards) if j != index]
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(count - std_ddof, 1)
    std = math.sqrt(variance) if count > 1 else 1.0
    share = Fraction(sum(reward > 0 for reward in rewards), count)
    return {
        "one": lambda: 1.0,
        "reward": lambda: float(own),
        "reward_minus_mean": lambda: float(own - mean),
        "group_norm": lambda: float(own - mean if others else own) / (std + std_eps),
        "reward_over_std": lambda: float(own) / (std + std_eps),
        "leave_one_out": lambda: float(own - (sum(others) / len(others) if others else 0)),
        "reward_minus_mean_over_p": lambda: float((own - mean) / share if share else 0),
    }[name]()


def test_an_advantage_over_the_share_of_correct_responses():
    """(r - mean) / p by hand; without a correct response there is none, whatever the rewards."""
    stats = stats_of(
        [1.0, -1.0, -1.0, -1.0],  # mean -1/2, p 1/4
        [1.0, 1.0, -1.0],  # mean 1/3, p 2/3
        [1.0, 1.0],
        [-1.0, -0.5],
        [],
        advantage="reward_minus_mean_over_p",
    )
    expected = [6.0, -2.0, -2.0, -2.0, 1.0, 1.0, -2.0, 0.0, 0.0, 0.0, 0.0]
    assert stats.advantages.tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], []])
def test_offsets_that_do_not_cover_the_rewards_are_refused(offsets):
    # of the definition, of the native op
    with pytest.raises((ValueError, RuntimeError), match=r"offsets.* ascend from 0 to|groups \+ 1"):
        group_stats(torch.zeros(3), torch.tensor(offsets).long())
