"""How good a response was, as one number; statistics are over its group as sampled."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.algorithms.presets import AdvantageName
from megatron_rl.ops.group_stats import group_stats, members

SumOverRanks = Callable[[Tensor], Tensor]
"""A float64 tensor -> its sum over all data-parallel ranks; every one of them must call it."""


def group_advantages(
    name: AdvantageName, rewards: Tensor, offsets: Tensor, *, std_ddof: int, std_eps: float
) -> Tensor:
    """[n] rewards of groups one after another -> [n] float64 advantages.

    Exactly 0 where at least two rewards of a group are all equal, for every advantage that
    subtracts the mean. batch_norm still lacks its whitening, and gae its critic.

    Args:
        name: which advantage.
        rewards: [n], finite.
        offsets: [G + 1] int64; group g is offsets[g] up to offsets[g + 1].
        std_ddof: as in group_stats.
        std_eps: added to the standard deviation, in reward units.
    """
    stats = group_stats(rewards, offsets, std_ddof=std_ddof)
    group_of = members(offsets)
    group = _Group(stats.mean[group_of], stats.std[group_of], stats.counts[group_of])
    return _ADVANTAGES[name](rewards.double(), group, std_eps)


def whiten(
    advantages: Tensor,
    num_tokens: Tensor,
    *,
    std_ddof: int,
    std_eps: float,
    sum_over_ranks: SumOverRanks,
) -> Tensor:
    """[n] advantages less their mean and over their std, both over the batch's response tokens.

    Collectives: two sums over ranks, of two numbers and of one; with n = 0 too.
    """
    advantages, num_tokens = advantages.double(), num_tokens.double()
    local = torch.stack([num_tokens.sum(), (advantages * num_tokens).sum()])
    sums = sum_over_ranks(local)
    centered = advantages - sums[1] / sums[0].clamp(min=1)
    squares = sum_over_ranks((centered.square() * num_tokens).sum())
    std = (squares / (sums[0] - std_ddof).clamp(min=1)).sqrt()
    return centered / (std + std_eps)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Statistics of each response's own group, [n] each."""

    mean: Tensor
    std: Tensor
    count: Tensor


def _one(rewards: Tensor, group: _Group, std_eps: float) -> Tensor:
    return torch.ones_like(rewards)


def _reward(rewards: Tensor, group: _Group, std_eps: float) -> Tensor:
    return rewards


def _reward_minus_mean(rewards: Tensor, group: _Group, std_eps: float) -> Tensor:
    return rewards - group.mean


def _group_norm(rewards: Tensor, group: _Group, std_eps: float) -> Tensor:
    """A response without others has mean 0 and std 1."""
    return (rewards - group.mean.where(group.count > 1, 0.0)) / (group.std + std_eps)


def _reward_over_std(rewards: Tensor, group: _Group, std_eps: float) -> Tensor:
    return rewards / (group.std + std_eps)


def _leave_one_out(rewards: Tensor, group: _Group, std_eps: float) -> Tensor:
    """r_i - mean_{j != i} r_j = (r_i - mean) * n / (n - 1); the reward where there is no other."""
    others = (group.count - 1).clamp(min=1)
    return ((rewards - group.mean) * group.count / others).where(group.count > 1, rewards)


def _preference(rewards: Tensor, group: _Group, std_eps: float) -> Tensor:
    """+1 for the right response of a pair and -1 for the wrong one."""
    return torch.where(rewards > 0, 1.0, -1.0).to(rewards.dtype)


_ADVANTAGES: dict[AdvantageName, Callable[[Tensor, _Group, float], Tensor]] = {
    "one": _one,
    "reward": _reward,
    "reward_minus_mean": _reward_minus_mean,
    "group_norm": _group_norm,
    "reward_over_std": _reward_over_std,
    "leave_one_out": _leave_one_out,
    "batch_norm": _reward_minus_mean,
    "gae": _reward,
    "preference": _preference,
}
