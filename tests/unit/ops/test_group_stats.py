import math

import pytest
import torch

from megatron_rl.ops.group_stats import group_stats


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


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], []])
def test_offsets_that_do_not_cover_the_rewards_are_refused(offsets):
    with pytest.raises(ValueError, match="must ascend from 0 to the number of rewards, 3"):
        group_stats(torch.zeros(3), torch.tensor(offsets))
