"""Supervised training: the data set's own responses instead of sampled ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rl.batching.packer import Packer
from megatron_rl.evaluation.report import Evaluation
from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import Prompt, Rollout, RolloutGroup

if TYPE_CHECKING:  # it imports Megatron-Core, which must be entered first
    from megatron_rl.policy.policy import Policy


class GoldRollouts:
    """Rollouts without an engine: nobody samples, grades, or needs the weights."""

    def __init__(self, groups: Groups, meter: Meter) -> None:
        self._groups, self._meter = groups, meter

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        share = prompts[self._groups.rank :: self._groups.layout.world_size]
        return [_gold_group(prompt, policy_version) for prompt in share]

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        return list(groups)

    def count(self, groups: Sequence[RolloutGroup]) -> None:
        self._meter.count(groups)

    def receive(self, policy: "Policy") -> None:
        pass

    def probe(self, policy: "Policy", packer: Packer, prompts: Sequence[Prompt]) -> None:
        pass

    def evaluate(self, iteration: int | None, policy_version: int) -> Evaluation:
        return Evaluation.empty()

    def describe(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


def _gold_group(prompt: Prompt, policy_version: int) -> RolloutGroup:
    assert prompt.gold_tokens is not None
    rollout = Rollout(
        response_tokens=prompt.gold_tokens,
        rollout_logprobs=None,
        finish_reason="gold",
        policy_version=policy_version,
    )
    return RolloutGroup(prompt=prompt, rollouts=(rollout,))
