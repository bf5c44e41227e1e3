"""Right and wrong among the responses of a group, as selections and rounds count them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rl.types import Rollout


@dataclass(frozen=True, slots=True)
class Signs:
    """How many responses have a reward above 0, and how many another one."""

    positive: int = 0
    negative: int = 0

    def __add__(self, other: "Signs") -> "Signs":
        return Signs(self.positive + other.positive, self.negative + other.negative)

    @property
    def are_mixed(self) -> bool:
        return self.positive > 0 and self.negative > 0


def signs(rollouts: Iterable[Rollout]) -> Signs:
    """Those of the usable ones; a response whose verification failed is neither."""
    rewards = [rollout.reward or 0.0 for rollout in rollouts if is_usable(rollout)]
    positive = sum(reward > 0 for reward in rewards)
    return Signs(positive, len(rewards) - positive)


def is_usable(rollout: Rollout, *, needs_reward: bool = True) -> bool:
    """Whether a response can be judged and trained on."""
    if rollout.num_response_tokens == 0:
        return False
    if rollout.reward is None:
        return rollout.finish_reason == "gold" or not needs_reward
    return math.isfinite(rollout.reward)
