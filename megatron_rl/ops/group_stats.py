"""Rewards of groups of responses, whole groups on one rank: statistics, keep-masks, advantages."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_rl.ops import backend

KeepRule = Literal["positive", "drop_all_wrong", "drop_all_correct", "drop_uniform"]
GroupAdvantage = Literal[
    "one",
    "reward",
    "reward_minus_mean",
    "group_norm",
    "reward_over_std",
    "leave_one_out",
    "reward_minus_mean_over_p",
]

KEEP_RULES: tuple[KeepRule, ...] = get_args(KeepRule)
GROUP_ADVANTAGES: tuple[GroupAdvantage, ...] = get_args(GroupAdvantage)  # in the native op's order

_KEEP_BITS: dict[KeepRule, int] = {
    "positive": 1,
    "drop_all_wrong": 2,
    "drop_all_correct": 4,
    "drop_uniform": 2 | 4,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupStats:
    """Statistics of G groups, and keep-mask and advantages of their n responses.

    A group without responses has mean 0, std 1, max -inf, min inf and no flag set.
    """

    mean: Tensor  # [G] float64; bit-equal to every reward where all_equal
    std: Tensor  # [G] float64; 1 where single, else exactly 0 where all_equal
    max: Tensor  # [G] float64
    min: Tensor  # [G] float64
    counts: Tensor  # [G] int64 responses
    all_equal: Tensor  # [G] bool, max == min
    all_correct: Tensor  # [G] bool, every reward > 0
    all_wrong: Tensor  # [G] bool, every reward <= 0
    single: Tensor  # [G] bool, one response
    has_nan: Tensor  # [G] bool; then mean, std, max and min are NaN and no other flag but single
    keep: Tensor  # [n] bool; nothing of a group that has_nan
    advantages: Tensor  # [n] float64


def group_stats(
    rewards: Tensor,
    offsets: Tensor,
    *,
    std_ddof: int = 1,
    keep: Collection[KeepRule] = (),
    advantage: GroupAdvantage = "reward",
    std_eps: float = 0.0,
) -> GroupStats:
    """Statistics of groups that lie one after another: group g is offsets[g] up to offsets[g + 1].

    Accumulated in float64, in two passes: a variance from squares would cancel. A reward is correct
    if it is > 0. Native ops never wait for the device.

    Args:
        rewards: [n] of any float dtype.
        offsets: [G + 1] int64, from 0 to n, ascending; an error where not, but native ops on a GPU
            do not ask, since that would wait for it.
        std_ddof: what the divisor of the variance lacks to the count: 1 is the sample's, 0 the
            population's. A group too small for it counts as std 1.
        keep: a response is kept if all of these agree; none keeps everything.
            positive: the best of its group, and correct. drop_all_wrong: some of its group are
            correct. drop_all_correct: some are not. drop_uniform: both.
        advantage: which one. Those that subtract the mean are exactly 0 where all_equal, but for a
            single response under group_norm (mean 0, std 1) and leave_one_out, which is its reward.
            reward_minus_mean_over_p divides by the share of correct ones, and is 0 without any.
        std_eps: added to the standard deviation, in reward units.
    """
    rewards = rewards.double()
    if not backend.is_native("group_stats", rewards, any_dtype=True):
        return group_stats_definition(
            rewards, offsets, std_ddof=std_ddof, keep=keep, advantage=advantage, std_eps=std_eps
        )
    rules = 0
    for rule in keep:
        rules |= _KEEP_BITS[rule]
    mean, std, largest, smallest, counts, flags, kept, advantages = (
        torch.ops.megatron_rl.group_stats(
            rewards.contiguous(),
            offsets.contiguous(),
            std_ddof,
            rules,
            GROUP_ADVANTAGES.index(advantage),
            std_eps,
        )
    )
    return GroupStats(
        mean=mean,
        std=std,
        max=largest,
        min=smallest,
        counts=counts,
        all_equal=flags[0],
        all_correct=flags[1],
        all_wrong=flags[2],
        single=flags[3],
        has_nan=flags[4],
        keep=kept,
        advantages=advantages,
    )


def group_stats_definition(
    rewards: Tensor,
    offsets: Tensor,
    *,
    std_ddof: int = 1,
    keep: Collection[KeepRule] = (),
    advantage: GroupAdvantage = "reward",
    std_eps: float = 0.0,
) -> GroupStats:
    """The same in PyTorch: the native op must equal it, and it runs where there is none."""
    _check_offsets(rewards, offsets)
    rewards = rewards.double()
    counts = offsets.diff()
    group_of = torch.arange(len(counts), device=offsets.device).repeat_interleave(counts)
    zeros = rewards.new_zeros(len(counts))
    largest = torch.full_like(zeros, -torch.inf).scatter_reduce(0, group_of, rewards, "amax")
    smallest = torch.full_like(zeros, torch.inf).scatter_reduce(0, group_of, rewards, "amin")
    all_equal = largest == smallest
    mean = zeros.index_add(0, group_of, rewards) / counts.clamp(min=1)
    # Equal rewards may differ from their rounded mean, and would get an advantage of noise.
    mean = mean.where(~all_equal, largest)
    squares = zeros.index_add(0, group_of, (rewards - mean[group_of]).square())
    std = (squares / (counts - std_ddof).clamp(min=1)).sqrt()
    std = std.where((counts > 1) & (counts > std_ddof), 1.0)
    has_nan = largest.isnan()
    correct = zeros.index_add(0, group_of, (rewards > 0).double())
    own = _OwnGroup(mean[group_of], std[group_of] + std_eps, counts[group_of], correct[group_of])
    kept = ~has_nan[group_of]
    if "positive" in keep:
        kept &= (rewards == largest[group_of]) & (rewards > 0)
    if {"drop_all_wrong", "drop_uniform"} & set(keep):
        kept &= (largest > 0)[group_of]
    if {"drop_all_correct", "drop_uniform"} & set(keep):
        kept &= (smallest <= 0)[group_of]
    return GroupStats(
        mean=mean,
        std=std,
        max=largest,
        min=smallest,
        counts=counts,
        all_equal=all_equal,
        all_correct=(smallest > 0) & (counts > 0),
        all_wrong=(largest <= 0) & (counts > 0),
        single=counts == 1,
        has_nan=has_nan,
        keep=kept,
        advantages=_ADVANTAGES[advantage](rewards, own),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _OwnGroup:
    """Statistics of each response's own group, [n] each."""

    mean: Tensor
    divisor: Tensor  # std + std_eps
    count: Tensor
    correct: Tensor  # rewards above 0


def _group_norm(rewards: Tensor, own: _OwnGroup) -> Tensor:
    """A response without others has mean 0 and std 1. A 0 stays 0, even over a divisor of 0."""
    centered = rewards - own.mean.where(own.count > 1, 0.0)
    return (centered / own.divisor).where(centered != 0, 0.0)


def _leave_one_out(rewards: Tensor, own: _OwnGroup) -> Tensor:
    """r_i - mean_{j != i} r_j = (r_i - mean) * n / (n - 1); the reward where there is no other."""
    others = (own.count - 1).clamp(min=1)
    return ((rewards - own.mean) * own.count / others).where(own.count > 1, rewards)


def _over_p(rewards: Tensor, own: _OwnGroup) -> Tensor:
    """(r_i - mean) / p, where p is the share of correct responses."""
    weighted = (rewards - own.mean) * own.count / own.correct
    return weighted.where(own.correct > 0, 0.0)


_ADVANTAGES: dict[GroupAdvantage, Callable[[Tensor, _OwnGroup], Tensor]] = {
    "one": lambda rewards, own: torch.ones_like(rewards),
    "reward": lambda rewards, own: rewards.clone(),
    "reward_minus_mean": lambda rewards, own: rewards - own.mean,
    "group_norm": _group_norm,
    "reward_over_std": lambda rewards, own: rewards / own.divisor,
    "leave_one_out": _leave_one_out,
    "reward_minus_mean_over_p": _over_p,
}


def _check_offsets(rewards: Tensor, offsets: Tensor) -> None:
    is_right = (
        len(offsets) > 0
        and int(offsets[0]) == 0
        and int(offsets[-1]) == len(rewards)
        and bool((offsets.diff() >= 0).all())
    )
    if not is_right:
        raise ValueError(
            f"offsets={offsets.tolist()}: must ascend from 0 to the number of rewards, "
            f"{len(rewards)}"
        )
