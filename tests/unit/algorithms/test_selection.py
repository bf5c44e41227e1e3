import random
from collections import Counter
from functools import cache
from itertools import permutations

import pytest
import torch

from megatron_rl.algorithms.presets import SELECTION_NAMES
from megatron_rl.algorithms.selection import Candidates, keep_mask, keep_rules
from megatron_rl.ops.group_stats import group_stats

MIXED = (1.0, -1.0, 1.0, -1.0)
ALL_CORRECT = (1.0, 1.0, 1.0)
ALL_WRONG = (-1.0, -1.0)
GRADED = (0.5, 1.0, 0.0, 1.0)  # a reward of 0 is wrong


def kept(rewards, *names, lengths=None, truncated=(), gold=(), seed=0, **limits):
    """Indices that are kept."""
    candidates = Candidates(
        rewards=rewards,
        lengths=lengths or (10,) * len(rewards),
        is_truncated=tuple(index in truncated for index in range(len(rewards))),
        is_gold=tuple(index in gold for index in range(len(rewards))),
    )
    rewards, offsets = torch.tensor(rewards).double(), torch.tensor([0, len(rewards)])
    by_reward = group_stats(rewards, offsets, keep=keep_rules(names)).keep.tolist()
    mask = keep_mask(
        candidates, by_reward, names, tie_break=cache(lambda: random.Random(seed)), **limits
    )
    assert len(mask) == len(rewards)
    return [index for index, is_kept in enumerate(mask) if is_kept]


@pytest.mark.parametrize(
    ("name", "rewards", "expected"),
    [
        ("all", MIXED, [0, 1, 2, 3]),
        ("all", ALL_WRONG, [0, 1]),
        ("positive", MIXED, [0, 2]),
        ("positive", GRADED, [1, 3]),  # only the best, not all that are good
        ("positive", ALL_CORRECT, [0, 1, 2]),
        ("positive", ALL_WRONG, []),  # the best of a bad group is not good
        ("positive", (0.0, 0.0), []),
        ("drop_all_wrong", MIXED, [0, 1, 2, 3]),
        ("drop_all_wrong", ALL_CORRECT, [0, 1, 2]),
        ("drop_all_wrong", ALL_WRONG, []),
        ("drop_all_wrong", (0.0, -1.0), []),
        ("drop_all_correct", MIXED, [0, 1, 2, 3]),
        ("drop_all_correct", ALL_CORRECT, []),
        ("drop_all_correct", (0.5, 1.0), []),  # both correct, though not equal
        ("drop_all_correct", ALL_WRONG, [0, 1]),
        ("drop_uniform", MIXED, [0, 1, 2, 3]),
        ("drop_uniform", GRADED, [0, 1, 2, 3]),
        ("drop_uniform", ALL_CORRECT, []),
        ("drop_uniform", ALL_WRONG, []),
        ("drop_uniform", (1.0,), []),
        ("positive", (1.0,), [0]),
        ("positive", (-1.0,), []),
    ],
)
def test_selection(name, rewards, expected):
    assert kept(rewards, name) == expected


@pytest.mark.parametrize("name", SELECTION_NAMES)
def test_an_empty_group_is_no_trouble(name):
    assert kept((), name, overlong_tokens=5) == []


def test_best_of_n_keeps_one_of_the_best():
    assert kept((0.2, 0.9, 0.5), "best_of_n") == [1]
    assert kept(ALL_WRONG, "best_of_n") in ([0], [1])


def test_best_of_n_breaks_ties_by_the_seed_alone_and_evenly():
    chosen = [kept(MIXED, "best_of_n", seed=seed)[0] for seed in range(200)]
    assert chosen == [kept(MIXED, "best_of_n", seed=seed)[0] for seed in range(200)]
    counts = Counter(chosen)
    assert set(counts) == {0, 2}
    assert min(counts.values()) > 70  # 100 expected; 4 standard deviations are 28


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ((0.2, 0.9, -0.5), [1, 2]),
        ((-1.0, 0.1), [0, 1]),
        (ALL_CORRECT, []),
        ((1.0, 0.5), []),  # both correct, though not equal
        (ALL_WRONG, []),
        ((0.0, -1.0), []),
        ((1.0,), []),
    ],
)
def test_best_and_worst_is_the_pair_of_a_mixed_group(rewards, expected):
    assert kept(rewards, "best_and_worst") == expected


def test_ties_of_best_and_worst_are_broken_by_the_seed_alone_and_evenly():
    chosen = [tuple(kept(MIXED, "best_and_worst", seed=seed)) for seed in range(400)]
    assert chosen == [tuple(kept(MIXED, "best_and_worst", seed=seed)) for seed in range(400)]
    counts = Counter(chosen)
    assert set(counts) == {(0, 1), (0, 3), (1, 2), (2, 3)}
    assert min(counts.values()) > 65  # 100 expected; 4 standard deviations are 35


def test_the_pair_is_chosen_from_what_is_left():
    left = ("drop_truncated", "best_and_worst")
    assert kept((1.0, 0.5, -1.0, -0.5), *left, truncated=(0, 2)) == [1, 3]
    assert kept((1.0, -0.5, -1.0), *left, truncated=(0,)) == []


@pytest.mark.parametrize(
    ("marks", "size", "expected"),
    [
        ("+-+--+++", 4, [0, 1, 2, 3]),  # the first two of each
        ("++++-+--", 4, [0, 1, 4, 6]),
        ("----+---", 4, [0, 1, 2, 4]),  # one right one, filled up with wrong ones
        ("+++++-++", 4, [0, 1, 2, 5]),
        ("++++++++", 4, [0, 1, 2, 3]),
        ("--------", 4, [0, 1, 2, 3]),
        ("+-", 4, [0, 1]),  # fewer than it keeps
        ("++", 4, [0, 1]),
        ("++--", 3, [0, 2, 3]),  # an odd one is wrong
        ("++-+", 3, [0, 1, 2]),
        ("-+-+-+", 2, [0, 1]),
    ],
)
def test_balanced_keeps_half_right_and_half_wrong(marks, size, expected):
    rewards = tuple({"+": 0.5, "-": 0.0}[mark] for mark in marks)
    assert kept(rewards, "balanced", balanced_size=size) == expected


def test_balanced_chooses_from_what_is_left():
    found = kept(
        (1.0, -1.0) * 4, "drop_truncated", "balanced", truncated=(0, 1, 2), balanced_size=4
    )
    assert found == [3, 4, 5, 6]
    assert kept((1.0, 1.0, -1.0, -1.0, -1.0), "balanced", max_per_group=1) == [0]


def test_gold_keeps_gold():
    assert kept((1.0, 1.0), "gold", gold=(1,)) == [1]


def test_truncated_and_overlong_responses():
    assert kept(MIXED, "drop_truncated", truncated=(0, 3)) == [1, 2]
    assert kept(MIXED, "drop_overlong", lengths=(5, 6, 7, 4), overlong_tokens=5) == [0, 3]


def test_selections_compose_in_order():
    # the group stays mixed as sampled, though its only correct response was cut
    assert kept((1.0, -1.0), "drop_truncated", "drop_uniform", truncated=(0,)) == [1]
    # the best of what is left
    assert kept((1.0, 0.5, -1.0), "drop_truncated", "best_of_n", truncated=(0,)) == [1]
    assert kept((1.0, 0.5, -1.0), "best_of_n", "drop_truncated", truncated=(0,)) == []


def test_the_place_of_a_condition_on_rewards_does_not_matter():
    """Which is why all groups are asked at once, before anything else is."""
    names = ("drop_all_wrong", "best_of_n", "positive", "drop_all_correct")
    draw = random.Random(0)
    for seed in range(50):
        rewards = tuple(draw.choice((-1.0, 0.0, 0.5, 1.0)) for _ in range(draw.randint(1, 6)))
        in_order = {
            order: tuple(kept_one_by_one(rewards, order, seed)) for order in permutations(names)
        }
        assert len(set(in_order.values())) == 1
        assert kept(rewards, *names, seed=seed) == list(in_order[names])


def kept_one_by_one(rewards, names, seed):
    """Straight from the words of the documentation, each selection in its turn."""
    keep = list(range(len(rewards)))
    for name in names:
        if name == "best_of_n":
            best = [i for i in keep if rewards[i] == max(rewards[j] for j in keep)]
            keep = [random.Random(seed).choice(best)] if best else []
        elif name == "positive":
            keep = [i for i in keep if rewards[i] == max(rewards) and rewards[i] > 0]
        elif name == "drop_all_wrong":
            keep = keep if any(reward > 0 for reward in rewards) else []
        elif name == "drop_all_correct":
            keep = keep if any(reward <= 0 for reward in rewards) else []
    return keep


def test_max_per_group_takes_the_first_that_are_kept():
    assert kept(MIXED, "positive", max_per_group=1) == [0]
    assert kept((-1.0, *ALL_CORRECT), "positive", max_per_group=2) == [1, 2]
    assert kept(MIXED, "all", max_per_group=9) == [0, 1, 2, 3]
