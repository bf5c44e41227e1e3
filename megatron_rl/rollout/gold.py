"""Supervised training: the data set's own responses instead of sampled ones."""

from collections.abc import Sequence

from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.without_engine import WithoutEngine
from megatron_rl.types import Prompt, Rollout, RolloutGroup


class GoldRollouts(WithoutEngine):
    """Each prompt's own response as its only rollout."""

    def __init__(self, groups: Groups, meter: Meter) -> None:
        self._groups, self._meter = groups, meter

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        share = prompts[self._groups.rank :: self._groups.layout.world_size]
        return [_gold_group(prompt, policy_version) for prompt in share]

    def count(self, groups: Sequence[RolloutGroup]) -> None:
        self._meter.count(groups)

    def describe(self) -> list[str]:
        return []


def _gold_group(prompt: Prompt, policy_version: int) -> RolloutGroup:
    assert prompt.gold_tokens is not None
    rollout = Rollout(
        response_tokens=prompt.gold_tokens,
        rollout_logprobs=None,
        finish_reason="gold",
        policy_version=policy_version,
    )
    return RolloutGroup(prompt=prompt, rollouts=(rollout,))
