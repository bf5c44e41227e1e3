"""What ranks that train and ranks that only sample say to each other.

The first rank that trains asks, all ranks that sample answer together, and one question is open at
a time. Groups of rollouts go from the rank that sampled them to the ranks that train, dealt out in
the order of their prompts, without the prompts, which both sides have.
"""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rl.evaluation.report import Evaluation
from megatron_rl.parallel.collectives import all_gather_objects, send_messages
from megatron_rl.parallel.sides import Job
from megatron_rl.types import Prompt, Rollout, RolloutGroup

BYTES_OF_A_WORD = 8


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Sample and grade the batch of an iteration."""

    place: int  # group id of its first prompt
    num_prompts: int  # without those that rounds may draw besides
    iteration: int
    policy_version: int


@dataclass(frozen=True)
class Receive:
    """Take the weights that are pushed."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Sample a little, to be scored."""

    policy_version: int


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate on the benchmarks."""

    iteration: int | None
    policy_version: int


@dataclass(frozen=True)
class Leave:
    """The run is over."""

    exit_code: int


Question = Generate | Receive | Probe | Evaluate | Leave


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the first rank that samples tells of an answer."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()  # of verifications, on any rank
    num_prompts: int = 0  # of the batch, with those that its rounds drew besides
    evaluation: Evaluation | None = None


class Exchange:
    """This rank's end; every rank of the job makes the same calls in the same order."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._trainers = job.side.trainers

    def ask(self, question: Question) -> None:
        """Ask; every rank that trains calls it with the same question."""
        all_gather_objects(question if self._job.side.is_main else None, self._job.world)

    def asked(self) -> Question:
        """The next question; every rank that samples calls it."""
        question: Question | None = all_gather_objects(None, self._job.world)[0]
        assert question is not None
        return question

    def give(self, told: Told, groups: Sequence[RolloutGroup], order: Sequence[Prompt]) -> None:
        """Answer with this rank's groups; order: the prompts of all ranks' groups."""
        number_of = {prompt.group_id: number for number, prompt in enumerate(order)}
        numbers = [number_of[group.prompt.group_id] for group in groups]
        messages = [
            _message((number, group.rollouts))
            for number, group in zip(numbers, groups, strict=True)
        ]
        send_messages(messages, [number % self._trainers for number in numbers], self._job.world)
        self._hear(told)

    def take(self) -> tuple[Told, dict[int, tuple[Rollout, ...]]]:
        """The answer: this rank's groups, by the number of their prompt."""
        groups = dict(_objects(send_messages([], [], self._job.world)))
        return self._hear(None), {number: groups[number] for number in sorted(groups)}

    def _hear(self, told: Told | None) -> Told:
        heard: Told | None = all_gather_objects(told, self._job.world)[self._trainers]
        assert heard is not None
        return heard


def _message(item: object) -> Tensor:
    """An object as int64 words, of which the first is the number of its bytes."""
    data = pickle.dumps(item)
    padded = data + bytes(-len(data) % BYTES_OF_A_WORD)
    words = torch.frombuffer(bytearray(padded), dtype=torch.int64)
    return torch.cat([torch.tensor([len(data)]), words])


def _objects(words: Tensor) -> list[tuple[int, tuple[Rollout, ...]]]:
    """The objects of messages that stand one behind the other."""
    found, at = [], 0
    while at < len(words):
        size = int(words[at])
        end = at + 1 + -(-size // BYTES_OF_A_WORD)
        # Of this job's own ranks, as the objects that torch's collectives carry.
        found.append(pickle.loads(words[at + 1 : end].numpy().tobytes()[:size]))
        at = end
    return found
