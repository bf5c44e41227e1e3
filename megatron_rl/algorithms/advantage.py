"""How good a response was, as one number; statistics are over its group as sampled."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rl.algorithms.presets import AdvantageName
from megatron_rl.ops.group_stats import GroupAdvantage

SumOverRanks = Callable[[Tensor], Tensor]
"""A float64 tensor -> its sum over all data-parallel ranks; every one of them must call it."""


OF_GROUP: dict[AdvantageName, GroupAdvantage] = {
    "one": "one",
    "reward": "reward",
    "reward_minus_mean": "reward_minus_mean",
    "group_norm": "group_norm",
    "reward_over_std": "reward_over_std",
    "leave_one_out": "leave_one_out",
    "reward_minus_mean_over_p": "reward_minus_mean_over_p",
    "batch_norm": "reward_minus_mean",
    "gae": "reward",
    "preference": "reward",
    "distillation": "one",  # in place of it comes that of each token
}
"""Advantage of a recipe -> the one that group_stats computes for it."""

UNFINISHED: frozenset[AdvantageName] = frozenset(
    {"batch_norm", "gae", "preference", "distillation"}
)
"""Advantages that a later step finishes: by whitening, a critic, the side of a pair, a teacher."""


def side(reward: float) -> float:
    """+1 for the right response of a pair and -1 for the wrong one."""
    return 1.0 if reward > 0 else -1.0


def whiten(
    advantages: Tensor,
    num_tokens: Tensor,
    *,
    std_ddof: int,
    std_eps: float,
    sum_over_ranks: SumOverRanks,
) -> Tensor:
    """[n] advantages minus their mean, divided by their std, both over the batch's tokens.

    num_tokens [n] says how many response tokens each advantage stands for.
    Collectives: two sums over ranks, of two numbers and of one; also where n is 0.
    """
    advantages, num_tokens = advantages.double(), num_tokens.double()
    local = torch.stack([num_tokens.sum(), (advantages * num_tokens).sum()])
    sums = sum_over_ranks(local)
    centered = advantages - sums[1] / sums[0].clamp(min=1)
    squares = sum_over_ranks((centered.square() * num_tokens).sum())
    std = (squares / (sums[0] - std_ddof).clamp(min=1)).sqrt()
    return centered / (std + std_eps)
