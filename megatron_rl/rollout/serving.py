"""The side of a run that only samples: it answers until the run is over."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain

from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.collectives import all_gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.sides import Job
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.reward.scorer import MAX_FAILURES
from megatron_rl.rollout.exchange import (
    Evaluate,
    Exchange,
    Generate,
    Leave,
    Probe,
    Question,
    Receive,
    Told,
)
from megatron_rl.rollout.sampled import SampledRollouts
from megatron_rl.weights.sync import WeightSync, sync_metrics

OWN_METRICS = ("rollout/rounds",)
"""Metrics that only these ranks can report."""


class Serving:
    """This rank's part of the answers; every rank that samples has one."""

    def __init__(
        self,
        rollouts: SampledRollouts,
        sync: WeightSync,
        exchange: Exchange,
        prompts: PromptStream,
        groups: Groups,
        meter: Meter,
        job: Job,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Args:
        rollouts: with the engine and the grader of this rank.
        sync: of weights, with the ranks that train.
        waiting: a context in which the other side is at work.
        """
        self._rollouts, self._sync, self._exchange = rollouts, sync, exchange
        self._prompts, self._groups, self._meter = prompts, groups, meter
        self._job, self._waiting = job, waiting

    def until_left(self) -> int:
        """Answer every question; the exit code of the run."""
        self._meter.restart()
        while True:
            with self._waiting():
                question = self._exchange.asked()
            if isinstance(question, Leave):
                return question.exit_code
            self._answer(question)

    def _answer(self, question: Question) -> None:
        if isinstance(question, Generate):
            self._generate(question)
        elif isinstance(question, Receive):
            with self._meter.phase("weight_sync"):
                sync_metrics(self._sync.push({}), self._job.world)
        elif isinstance(question, Probe):
            with self._meter.phase("rollout"):
                prompts = self._prompts.all_prompts()
                drawn = self._rollouts.draw_probe(prompts, policy_version=question.policy_version)
            self._exchange.give(Told(), drawn, prompts)
        elif isinstance(question, Evaluate):
            with self._meter.phase("evaluation"):
                found = self._rollouts.evaluate(question.iteration, question.policy_version)
            self._exchange.give(Told(evaluation=found), [], [])

    def _generate(self, question: Generate) -> None:
        self._meter.restart()
        self._meter.begin(question.iteration)
        batch = self._prompts.batch_at(question.place)
        with self._meter.phase("rollout"):
            groups = self._rollouts.generate(
                batch, iteration=question.iteration, policy_version=question.policy_version
            )
        with self._meter.phase("reward"):
            groups = self._rollouts.grade(groups)
        values = self._meter.take()
        order = self._prompts.batch  # with those that rounds have drawn besides
        told = Told(
            metrics={
                "time/sampling_s": values["time/iteration_s"],
                "memory/sampling_gib": values["memory/peak_gib"],
                **{name: values[name] for name in OWN_METRICS if name in values},
            },
            failures=self._failures(),
            num_prompts=len(order),
        )
        self._exchange.give(told, groups, order)

    def _failures(self) -> tuple[str, ...]:
        """The first of all ranks; no more than one rank would keep."""
        failures = all_gather_objects(self._rollouts.scorer.failures, self._groups.world)
        return tuple(chain.from_iterable(failures))[:MAX_FAILURES]
