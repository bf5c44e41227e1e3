"""When a checkpoint is written."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from megatron_rl.checkpoint.config import CheckpointConfig


@dataclass(kw_only=True)
class SaveTimes:
    """What was saved so far, and what is due; every rank has one, and all agree."""

    config: CheckpointConfig
    iteration: int = 0  # of the newest checkpoint
    score: float | None = None  # of checkpoint.keep_best, in the iteration asked about last
    best: float = -math.inf
    at: float = field(default_factory=time.monotonic)

    def is_due(
        self,
        iteration: int,
        *,
        is_last: bool,
        values: Mapping[str, float],
        slowest: Callable[[float], float],
    ) -> bool:
        """True where a checkpoint is to be written after this iteration.

        Args:
            iteration: that is done.
            is_last: of the run.
            values: its metrics.
            slowest: the largest of all ranks' values, since their clocks differ.
        """
        self.score = values.get(self.config.keep_best or "")
        if self.config.save_every == 0:
            return False
        if is_last or (self.score is not None and self.score > self.best):
            return True
        if self.config.save_every is not None:
            return iteration % self.config.save_every == 0
        return slowest((time.monotonic() - self.at) / 60) >= self.config.save_minutes

    def saved(self, iteration: int) -> None:
        """A checkpoint was written after this iteration."""
        self.iteration, self.at = iteration, time.monotonic()
        self.best = max(self.best, -math.inf if self.score is None else self.score)

    def resumed(self, iteration: int, score: float | None, scores: Iterable[float | None]) -> None:
        """The run goes on from this iteration; scores: of all checkpoints that are there."""
        self.iteration, self.score = iteration, score
        self.best = max((each for each in scores if each is not None), default=-math.inf)
