"""Where an iteration's responses come from: sampled by the engine, or gold ones from the data."""

from collections.abc import Sequence
from typing import Protocol

from megatron_rl.parallel.groups import Groups
from megatron_rl.reward.scorer import RewardScorer, attach
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.sampler import Sampler, SamplingPlan
from megatron_rl.types import Prompt, Rollout, RolloutGroup


class RolloutSource(Protocol):
    """What the loop asks for responses, and for their rewards."""

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        """This rank's groups of the global batch; every rank calls it with the same prompts."""
        ...

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with rewards and verdicts."""
        ...


class SampledRollouts:
    """Responses of the engine; scoring starts as each is finished."""

    def __init__(
        self, engine: Engine, sampler: Sampler, scorer: RewardScorer, plan: SamplingPlan
    ) -> None:
        self._engine, self._sampler, self._scorer, self._plan = engine, sampler, scorer, plan

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        groups = self._sampler.generate(
            prompts,
            self._plan,
            iteration=iteration,
            policy_version=policy_version,
            grader=self._scorer,
        )
        self._engine.sleep()  # the trainer needs the memory until the next weight sync
        return groups

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        return attach(groups, self._scorer.collect())


class GoldRollouts:
    """Supervised training: the data set's own responses, graded by nobody."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        share = prompts[self._groups.rank :: self._groups.layout.world_size]
        return [_gold_group(prompt, policy_version) for prompt in share]

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        return list(groups)


def _gold_group(prompt: Prompt, policy_version: int) -> RolloutGroup:
    assert prompt.gold_tokens is not None
    rollout = Rollout(
        response_tokens=prompt.gold_tokens,
        rollout_logprobs=None,
        finish_reason="gold",
        policy_version=policy_version,
    )
    return RolloutGroup(prompt=prompt, rollouts=(rollout,))
