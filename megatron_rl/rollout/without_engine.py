"""What rollouts have in common that no engine samples."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.batching.packer import Packer
from megatron_rl.evaluation.report import Evaluation
from megatron_rl.types import Prompt, RolloutGroup

if TYPE_CHECKING:  # it imports Megatron-Core, which must be entered first
    from megatron_rl.policy.policy import Policy


class WithoutEngine:
    """Nobody samples, grades, or needs the weights."""

    def grade(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        return list(groups)

    def receive(self, policy: "Policy") -> None:
        pass

    def settle(self) -> None:
        pass

    def state(self) -> None:
        return None

    def load_state(self, checkpoint: Path) -> list[str]:
        return []

    def probe(self, policy: "Policy", packer: Packer, prompts: Sequence[Prompt]) -> None:
        pass

    def evaluate(self, iteration: int | None, policy_version: int) -> Evaluation:
        return Evaluation.empty()

    def paused(self, *, only_weights: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def dismiss(self, exit_code: int) -> None:
        pass  # nobody else is to leave

    def close(self) -> None:
        pass
