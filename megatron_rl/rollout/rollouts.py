"""The side of a run that brings responses: the interface that the loop uses."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_rl.batching.packer import Packer
from megatron_rl.evaluation.report import Evaluation
from megatron_rl.types import Prompt, RolloutGroup

if TYPE_CHECKING:  # it imports Megatron-Core, which must be entered first
    from megatron_rl.policy.policy import Policy


class Rollouts(Protocol):
    """This rank's part of that side.

    Every rank makes every call. Prompts are the same on all ranks, groups are the rank's own.
    """

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        """This rank's groups of the global batch: each group is on exactly one rank.

        Further prompts may have been drawn, which then belong to the batch, too. Groups may be none
        where a rank was told to stop.
        """
        ...

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with rewards and verdicts; waits for the last of them."""
        ...

    def count(self, groups: Sequence[RolloutGroup]) -> None:
        """Report what was drawn, over all ranks.

        Raises:
            RunError: on all ranks, if too many verifications failed.
        """
        ...

    def settle(self) -> None:
        """Wait for what is being sampled ahead, before anything else is asked of the engines."""
        ...

    def receive(self, policy: "Policy") -> None:
        """Sample from these weights from now on; the bytes that were sent are reported.

        Raises:
            RunError: on all ranks, if other weights arrived than were sent.
        """
        ...

    def probe(self, policy: "Policy", packer: Packer, prompts: Sequence[Prompt]) -> None:
        """Sample a little and score it with the policy.

        Raises:
            RunError: on all ranks, if the two disagree on a sampled token.
        """
        ...

    def evaluate(self, iteration: int | None, policy_version: int) -> Evaluation | None:
        """The result on the recipe's benchmarks; an empty one where there are none.

        None on all ranks where any was told to stop meanwhile.
        """
        ...

    def paused(self, *, only_weights: bool = False) -> AbstractContextManager[None]:
        """The device is the trainer's inside; then the engine has it again, with its weights.

        only_weights: those of the trainer are all that is needed of it inside.
        """
        ...

    def state(self) -> dict[str, Any] | None:
        """What this rank has of the next iteration's rollouts, for its file of a checkpoint; None
        on all ranks where nothing is sampled ahead.
        """
        ...

    def load_state(self, checkpoint: Path) -> list[str]:
        """Go on with what a checkpoint has of that; lines that say what became of it."""
        ...

    def describe(self) -> list[str]:
        """Lines for the start of a run."""
        ...

    def dismiss(self, exit_code: int) -> None:
        """Have ranks that only sample leave the run, with its exit code."""
        ...

    def close(self) -> None:
        """End worker processes and the engine; the last thing that a process does with them."""
        ...
