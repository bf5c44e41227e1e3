"""Reward statistics of groups of responses, whole groups on one rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.ops import backend


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupStats:
    """Of each of G groups.

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


def group_stats(rewards: Tensor, offsets: Tensor, *, std_ddof: int = 1) -> GroupStats:
    """Statistics of groups that lie one after another: group g is offsets[g] up to offsets[g + 1].

    Accumulated in float64, in two passes: a variance from squares would cancel.

    Args:
        rewards: [n] of any float dtype.
        offsets: [G + 1] int64, from 0 to n, ascending.
        std_ddof: what the divisor of the variance lacks to the count: 1 is the sample's, 0 the
            population's. A group too small for it counts as std 1.
    """
    if rewards.device.type == "cpu":  # elsewhere it would wait for the device
        _check_offsets(rewards, offsets)
    rewards = rewards.double()
    if backend.is_native("group_stats", rewards, any_dtype=True):
        mean, std, largest, smallest, counts, flags = torch.ops.megatron_rl.group_stats(
            rewards.contiguous(), offsets.contiguous(), std_ddof
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
        )
    return group_stats_definition(rewards, offsets, std_ddof=std_ddof)


def group_stats_definition(rewards: Tensor, offsets: Tensor, *, std_ddof: int = 1) -> GroupStats:
    """What the native op must equal, and what runs where there is none."""
    rewards = rewards.double()
    counts = offsets.diff()
    group_of = members(offsets)
    zeros = rewards.new_zeros(len(counts))
    largest = torch.full_like(zeros, -torch.inf).scatter_reduce(0, group_of, rewards, "amax")
    smallest = torch.full_like(zeros, torch.inf).scatter_reduce(0, group_of, rewards, "amin")
    all_equal = largest == smallest
    mean = zeros.index_add(0, group_of, rewards) / counts.clamp(min=1)
    # Equal rewards may differ from their rounded mean, and would get an advantage of noise.
    mean = mean.where(~all_equal, largest)
    squares = zeros.index_add(0, group_of, (rewards - mean[group_of]).square())
    std = (squares / (counts - std_ddof).clamp(min=1)).sqrt()
    has_std = (counts > 1) & (counts > std_ddof)
    return GroupStats(
        mean=mean,
        std=std.where(has_std, 1.0),
        max=largest,
        min=smallest,
        counts=counts,
        all_equal=all_equal,
        all_correct=(smallest > 0) & (counts > 0),
        all_wrong=(largest <= 0) & (counts > 0),
        single=counts == 1,
        has_nan=zeros.index_add(0, group_of, rewards.isnan().double()) > 0,
    )


def members(offsets: Tensor) -> Tensor:
    """[n] int64: the group that each response belongs to."""
    counts = offsets.diff()
    return torch.arange(len(counts), device=offsets.device).repeat_interleave(counts)


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
