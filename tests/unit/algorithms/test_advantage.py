import math

import pytest
import torch

from megatron_rl.algorithms.advantage import OF_GROUP, side, whiten
from megatron_rl.algorithms.presets import ADVANTAGE_NAMES
from megatron_rl.ops.group_stats import group_stats


def advantages(name, *groups, **settings):
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    offsets = torch.tensor([0, *[len(group) for group in groups]]).cumsum(0)
    stats = group_stats(rewards, offsets, advantage=OF_GROUP[name], **settings)
    return [part.tolist() for part in stats.advantages.split([len(group) for group in groups])]


# Mean -0.5, deviations 1.5 and thrice -0.5: squares sum to 3, sample variance 1.
MIXED = [1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one", [1.0, 1.0, 1.0, 1.0]),
        ("reward", MIXED),
        ("reward_minus_mean", [1.5, -0.5, -0.5, -0.5]),
        ("group_norm", [1.5, -0.5, -0.5, -0.5]),
        ("reward_over_std", [1.0, -1.0, -1.0, -1.0]),
        ("leave_one_out", [2.0, -2 / 3, -2 / 3, -2 / 3]),  # less the mean of the other three
        ("reward_minus_mean_over_p", [6.0, -2.0, -2.0, -2.0]),  # a quarter is right
        ("batch_norm", [1.5, -0.5, -0.5, -0.5]),
        ("preference", MIXED),  # the reward, of which a pair takes the side
        ("gae", MIXED),  # the reward, until the critic is asked
    ],
)
def test_advantages_match_hand_calculation(name, expected):
    assert advantages(name, MIXED)[0] == pytest.approx(expected, rel=1e-14)


def test_the_side_of_a_pair_is_whether_the_response_is_right():
    assert [side(reward) for reward in (0.2, -0.7, 0.0)] == [1.0, -1.0, -1.0]


def test_groups_are_judged_apart_and_may_be_ragged():
    # (1, 0): mean 0.5, sample std sqrt(0.5); (3, 0, 0): mean 1, squares 6, sample std sqrt(3)
    pair, triple = advantages("group_norm", [1.0, 0.0], [3.0, 0.0, 0.0])
    assert pair == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    assert triple == pytest.approx([2 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)])


def test_population_std_and_eps():
    # population std of (1, -1) is 1
    assert advantages("group_norm", [1.0, -1.0], std_ddof=0, std_eps=0.25)[0] == [0.8, -0.8]
    assert advantages("reward_over_std", [1.0, -1.0], std_ddof=0, std_eps=0.25)[0] == [0.8, -0.8]


@pytest.mark.parametrize(
    "name",
    [
        "reward_minus_mean",
        "group_norm",
        "leave_one_out",
        "reward_minus_mean_over_p",
        "batch_norm",
    ],
)
@pytest.mark.parametrize("reward", [1.0, -1.0, 0.1, 0.7, 1 / 3])  # most not exact in binary
@pytest.mark.parametrize("size", [2, 8, 16])
def test_equal_rewards_have_an_advantage_of_exactly_zero(name, reward, size):
    assert advantages(name, [reward] * size, std_eps=1e-6)[0] == [0.0] * size


def test_a_single_response():
    expected = {
        "one": 1.0,
        "reward": -0.4,
        "reward_minus_mean": 0.0,
        "group_norm": -0.4,  # mean 0, std 1
        "reward_over_std": -0.4,
        "leave_one_out": -0.4,  # there is no other to compare with
        "reward_minus_mean_over_p": 0.0,
        "batch_norm": 0.0,
        "gae": -0.4,
        "preference": -0.4,
        "distillation": 1.0,  # until the teacher has judged each token
    }
    assert set(expected) == set(ADVANTAGE_NAMES)
    for name, value in expected.items():
        assert advantages(name, [-0.4])[0] == [value]


@pytest.mark.parametrize("name", ADVANTAGE_NAMES)
def test_order_and_absence_do_not_matter(name):
    rewards = [0.3, -1.0, 0.9, 0.3, 0.1]
    forward, empty = advantages(name, rewards, [], std_eps=1e-6)
    backward = advantages(name, [1.0, 0.0], rewards[::-1], std_eps=1e-6)[1]
    assert backward[::-1] == pytest.approx(forward, rel=1e-12)
    assert empty == []


def test_whitening_is_over_tokens():
    # tokens: 2 for the first response, 1 and 1: mean (2*3 + 1 - 3) / 4 = 1,
    # squares 2*4 + 0 + 16 = 24, sample variance 24 / 3 = 8
    result = whiten(
        torch.tensor([3.0, 1.0, -3.0]),
        torch.tensor([2, 1, 1]),
        std_ddof=1,
        std_eps=0.0,
        sum_over_ranks=lambda local: local,
    )
    root = math.sqrt(8)
    assert result.tolist() == pytest.approx([2 / root, 0.0, -4 / root])


def test_whitening_does_not_depend_on_how_responses_lie_on_ranks():
    torch.manual_seed(0)
    values, lengths = torch.randn(9).double(), torch.randint(1, 50, (9,))
    settings = {"std_ddof": 1, "std_eps": 1e-6}
    whole = whiten(values, lengths, sum_over_ranks=lambda local: local, **settings)
    parts = [slice(0, 4), slice(4, 4), slice(4, 9)]  # the second rank has none

    mean = (values * lengths).sum() / lengths.sum()
    sums = [
        torch.stack([lengths.sum().double(), (values * lengths).sum()]),
        ((values - mean).square() * lengths).sum(),
    ]
    for part in parts:
        answers = iter(sums)
        result = whiten(
            values[part],
            lengths[part],
            sum_over_ranks=lambda local, answers=answers: next(answers),
            **settings,
        )
        torch.testing.assert_close(result, whole[part], atol=1e-14, rtol=1e-13)


def test_whitening_equal_advantages_is_harmless():
    result = whiten(
        torch.zeros(3),
        torch.tensor([1, 2, 3]),
        std_ddof=1,
        std_eps=1e-6,
        sum_over_ranks=lambda local: local,
    )
    assert result.tolist() == [0.0, 0.0, 0.0]
