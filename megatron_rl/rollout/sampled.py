"""Responses that the engine of this rank samples, their grading, and the sync of its weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.batching.packer import Packer
from megatron_rl.evaluation.evaluator import Evaluator
from megatron_rl.evaluation.report import Evaluation
from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.policy.offload import OffloadedTrainer
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.scorer import RewardScorer, attach, check_failures
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.probe import check_engine, draw_probe
from megatron_rl.rollout.rounds import Rounds, round_metrics
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.types import Draw, Prompt, RolloutGroup
from megatron_rl.weights.sync import WeightSync, sync_metrics

if TYPE_CHECKING:  # it imports Megatron-Core, which must be entered first
    from megatron_rl.policy.policy import Policy


@dataclass(frozen=True, kw_only=True)
class SampledRollouts:
    """Rollouts with an engine, a grader and a weight bridge on every rank."""

    engine: Engine
    sampler: Sampler
    scorer: RewardScorer
    sync: WeightSync | None  # None: the policy itself samples
    evaluator: Evaluator
    reward: RewardConfig
    draw: Draw  # of training
    rounds: Rounds | None  # of training; None: all responses of a prompt at once
    trainer: OffloadedTrainer  # on the same device
    shares_device: bool  # the engine sleeps while the device is the trainer's
    max_logprob_gap: float  # nats; the probe stops a run that exceeds it
    groups: Groups
    meter: Meter
    stop: StopRequest
    say: Callable[[str], None]

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        if self.rounds is not None:
            groups = self.rounds.generate(
                prompts,
                iteration=iteration,
                policy_version=policy_version,
                report=self.meter.report,
            )
        else:
            groups = self.sampler.generate(
                prompts,
                self.draw,
                iteration=iteration,
                policy_version=policy_version,
                grader=self.scorer,
                stop=self.stop,
            )
        if self.shares_device:
            self.engine.sleep()  # the trainer needs the memory until the next weight sync
        return groups

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        if self.rounds is not None:  # graded round by round
            return list(groups)
        return attach(groups, self.scorer.collect())

    def count(self, groups: Sequence[RolloutGroup]) -> None:
        verdicts = self.meter.count(groups, tuple(self.reward.parts))
        check_failures(verdicts, self.reward, self.scorer.failures)
        if self.rounds is not None:
            self.meter.report(round_metrics(groups, self.rounds.plan, self.groups.world))

    def receive(self, policy: "Policy") -> None:
        if self.sync is None:
            self.trainer.leaves()
            return
        self.trainer.state_leaves()
        self.engine.wake_for_weights()
        report = self.sync.push(policy.named_parameters())
        self.trainer.leaves()
        self.engine.wake_for_generation()
        self.meter.report(sync_metrics(report, self.groups.world))

    def settle(self) -> None:
        pass  # nothing is sampled ahead

    def draw_probe(self, prompts: Sequence[Prompt], *, policy_version: int) -> list[RolloutGroup]:
        """This rank's part of what the start-up check samples."""
        return draw_probe(
            self.sampler,
            self.draw,
            prompts,
            engines=self.groups.engines.num_engines,
            policy_version=policy_version,
        )

    def probe(self, policy: "Policy", packer: Packer, prompts: Sequence[Prompt]) -> None:
        drawn = self.draw_probe(prompts, policy_version=policy.version)
        scoring = self.paused(only_weights=True)
        bound = self.max_logprob_gap
        self.say(check_engine(drawn, policy, packer, bound=bound, scoring=scoring))

    def evaluate(self, iteration: int | None, policy_version: int) -> Evaluation | None:
        def drawn(prompts: Sequence[Prompt], draw: Draw) -> list[RolloutGroup] | None:
            # Seeds do not depend on the iteration, so two evaluations differ by the policy alone.
            groups = self.sampler.generate(
                prompts,
                draw,
                iteration=0,
                policy_version=policy_version,
                grader=self.scorer,
                stop=self.stop,
            )
            if self.stop.agreed(self.groups.world):
                return None
            return attach(groups, self.scorer.collect())

        return self.evaluator.run(drawn, iteration=iteration, policy_version=policy_version)

    @contextmanager
    def paused(self, *, only_weights: bool = False) -> Iterator[None]:
        is_away = self.trainer.offload == "weights" or (
            self.trainer.offload == "optimizer" and not only_weights
        )
        was_awake = self.engine.is_awake
        if is_away:
            self.engine.sleep(keeps_weights=True)
        yield
        if is_away and was_awake:
            self.trainer.leaves()
            self.engine.wake()

    def state(self) -> None:
        return None

    def load_state(self, checkpoint: Path) -> list[str]:
        return []

    def describe(self) -> list[str]:
        engines = self.groups.engines
        told = f"rollout: {engines.num_engines} engines of {engines.told}"
        rounds = [] if self.rounds is None else [self.rounds.plan.line()]
        if self.sync is None:
            return [f"{told}, the policy itself", *rounds, self.trainer.line()]
        stats = self.sync.stats
        num_nodes = len(set(self.groups.nodes))
        between = f", {stats.between_nodes / 2**20:.2f} MiB of them between {num_nodes} nodes"
        return [
            f"{told}; weight sync moves "
            f"{stats.wire_total / 2**20:.2f} MiB in {stats.num_buckets} buckets"
            + (between if num_nodes > 1 else ""),
            *rounds,
            self.trainer.line(),
        ]

    def dismiss(self, exit_code: int) -> None:
        pass  # nobody else is to leave

    def close(self) -> None:
        self.scorer.close()
        self.engine.shutdown()
