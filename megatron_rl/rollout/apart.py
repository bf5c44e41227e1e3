"""Responses that other ranks of the job sample, in turns with the trainer or while it trains.

With run.lag=1 iteration k + 1 is sampled while k is trained:

    ranks that sample   | k + 1, by weights k - 1 | . | k + 2, by weights k | . | ...
    ranks that train    | train k                 | s | train k + 1         | s | ...

At s what was sampled is fetched and the new weights are pushed. So every sample but those of a
run's first iteration is of the weights one iteration before the newest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.batching.packer import Packer
from megatron_rl.evaluation.report import Evaluation
from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.layout import EngineLayout
from megatron_rl.parallel.sides import Job
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.scorer import check_failures
from megatron_rl.rollout.exchange import Evaluate, Exchange, Generate, Leave, Probe, Receive, Told
from megatron_rl.rollout.plain import group_of, plain_group
from megatron_rl.rollout.probe import check_engine
from megatron_rl.rollout.rounds import RoundsPlan, round_metrics
from megatron_rl.types import Prompt, RolloutGroup
from megatron_rl.weights.sync import WeightSync, sync_metrics

if TYPE_CHECKING:  # it imports Megatron-Core, which must be entered first
    from megatron_rl.policy.policy import Policy

FILE = "ahead_{rank}.pt"
"""The file of a rank that trains in a checkpoint, with its part of the next iteration's groups."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """An iteration's groups on this rank, as they came or were read from a checkpoint."""

    question: Generate
    told: Told
    groups: list[RolloutGroup]


class RolloutsApart:
    """This rank's end of the rollouts of ranks that only sample."""

    def __init__(
        self,
        job: Job,
        exchange: Exchange,
        sync: WeightSync,
        prompts: PromptStream,
        groups: Groups,
        meter: Meter,
        *,
        engines: EngineLayout,
        rounds: RoundsPlan | None,
        reward: RewardConfig,
        lag: int,
        num_iterations: int,
        max_logprob_gap: float,
        say: Callable[[str], None],
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Args:
        sync: of weights, with the ranks that sample.
        prompts: of the run, which the ranks that sample follow.
        engines: theirs.
        rounds: their rule of the run's rounds, where there are any.
        lag: run.lag.
        num_iterations: of the run.
        max_logprob_gap: nats; the probe stops a run that exceeds it.
        waiting: a context in which the other side is at work.
        """
        self._job, self._exchange, self._sync = job, exchange, sync
        self._prompts, self._groups, self._meter = prompts, groups, meter
        self._engines, self._rounds, self._reward = engines, rounds, reward
        self._lag, self._num_iterations = lag, num_iterations
        self._max_logprob_gap, self._say, self._waiting = max_logprob_gap, say, waiting
        self._open: Generate | None = None  # what is being sampled
        self._next: _Batch | None = None  # what has been
        self._failures: tuple[str, ...] = ()
        self._policy_version = 0

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        self.settle()
        asked = (prompts[0].group_id, len(prompts), iteration)
        if self._next is not None and _about(self._next.question) != asked:
            self._say(
                f"iteration {iteration}: it has another batch than the checkpoint's rollouts, and "
                "is drawn anew"
            )
            self._next = None
        if self._next is None:
            self._ask(*asked, policy_version)
            self.settle()
        found = self._next
        assert found is not None
        self._policy_version, self._failures = policy_version, found.told.failures
        self._prompts.more(found.told.num_prompts - len(prompts))
        self._meter.report(
            {
                **found.told.metrics,
                "rollout/updates_behind": float(policy_version - found.question.policy_version),
            }
        )
        return found.groups

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """They came graded; from here on the iteration is not begun anew, so the next one is."""
        assert self._next is not None
        asked = self._next.question
        self._next = None
        if self._lag and asked.iteration < self._num_iterations:
            self._ask(
                self._prompts.place, asked.num_prompts, asked.iteration + 1, self._policy_version
            )
        return list(groups)

    def count(self, groups: Sequence[RolloutGroup]) -> None:
        verdicts = self._meter.count(groups, tuple(self._reward.parts))
        check_failures(verdicts, self._reward, self._failures)
        if self._rounds is not None:
            self._meter.report(round_metrics(groups, self._rounds, self._groups.world))

    def settle(self) -> None:
        if self._open is None:
            return
        question, self._open = self._open, None
        with self._waiting():
            told, rollouts = self._exchange.take()
        batch = self._prompts.peek(question.place, told.num_prompts)
        groups = [
            RolloutGroup(prompt=batch[number], rollouts=found) for number, found in rollouts.items()
        ]
        self._next = _Batch(question=question, told=told, groups=groups)

    def receive(self, policy: "Policy") -> None:
        self.settle()
        self._exchange.ask(Receive())
        report = self._sync.push(policy.named_parameters())
        self._meter.report(sync_metrics(report, self._job.world))

    def probe(self, policy: "Policy", packer: Packer, prompts: Sequence[Prompt]) -> None:
        self.settle()
        self._exchange.ask(Probe(policy_version=policy.version))
        with self._waiting():
            _, rollouts = self._exchange.take()
        drawn = [
            RolloutGroup(prompt=prompts[number], rollouts=found)
            for number, found in rollouts.items()
        ]
        self._say(check_engine(drawn, policy, packer, bound=self._max_logprob_gap))

    def evaluate(self, iteration: int | None, policy_version: int) -> Evaluation | None:
        self.settle()
        self._exchange.ask(Evaluate(iteration=iteration, policy_version=policy_version))
        with self._waiting():
            told, _ = self._exchange.take()
        return told.evaluation

    @contextmanager
    def paused(self, *, only_weights: bool = False) -> Iterator[None]:
        yield  # no engine is on this device

    def state(self) -> dict[str, Any] | None:
        if not self._lag:
            return None
        self.settle()
        found = self._next
        if found is None:
            return {"groups": []}
        return {
            "groups": [plain_group(group) for group in found.groups],
            "question": asdict(found.question),
            "told": asdict(found.told),
        }

    def load_state(self, checkpoint: Path) -> list[str]:
        if not self._lag:
            return []
        world, rank = self._groups.layout.world_size, self._groups.rank
        names = [checkpoint / FILE.format(rank=saved) for saved in range(world)]
        is_same = (
            all(path.exists() for path in names)
            and not (checkpoint / FILE.format(rank=world)).exists()
        )
        paths = [names[rank]] if is_same else sorted(checkpoint.glob(FILE.format(rank="*")))
        states = [torch.load(path, weights_only=True) for path in paths]
        groups = [group_of(plain) for state in states for plain in state["groups"]]
        if not states or "question" not in states[0]:
            return []
        groups.sort(key=lambda group: group.prompt.group_id)
        self._next = _Batch(
            question=Generate(**states[0]["question"]),
            told=Told(**states[0]["told"]),
            groups=groups if is_same else groups[rank::world],
        )
        return [f"iteration {self._next.question.iteration}: its rollouts are the checkpoint's"]

    def describe(self) -> list[str]:
        stats, separate = self._sync.stats, self._job.samplers
        nodes = len(set(self._job.nodes))
        between = f", {stats.between_nodes / 2**20:.2f} MiB of them between {nodes} nodes"
        when = "while the one before is trained" if self._lag else "in turns with the trainer"
        return [
            f"rollout: {self._engines.num_engines} engines of {self._engines.told} on the last "
            f"{separate} ranks, which only sample, {when}; weight sync moves "
            f"{stats.wire_total / 2**20:.2f} MiB in {stats.num_buckets} buckets"
            + (between if nodes > 1 else ""),
            *([] if self._rounds is None else [self._rounds.line()]),
        ]

    def close(self) -> None:
        pass  # nothing is here to close

    def dismiss(self, exit_code: int) -> None:
        self.settle()
        self._exchange.ask(Leave(exit_code))

    def _ask(self, place: int, num_prompts: int, iteration: int, policy_version: int) -> None:
        self._open = Generate(
            place=place,
            num_prompts=num_prompts,
            iteration=iteration,
            policy_version=policy_version,
        )
        self._exchange.ask(self._open)


def _about(question: Generate) -> tuple[int, int, int]:
    """What makes a batch another one: its prompts and the seeds of its responses."""
    return question.place, question.num_prompts, question.iteration
