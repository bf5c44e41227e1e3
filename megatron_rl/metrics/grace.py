"""Whether a stop has the time that it needs before torchrun kills the ranks."""

from collections.abc import Iterator, Mapping
from math import ceil

TRAINING = ("reward", "logprob", "update", "weight_sync")
"""Phases that a stop waits for the end of; sampling and evaluation it breaks off."""


class Grace:
    """Compares what a stop may have to wait for with the time that torchrun gives it."""

    def __init__(self, seconds: float | None) -> None:
        """seconds: as parallel.stop.seconds_to_stop says it."""
        self._seconds = seconds
        self._checkpoint = 0.0  # seconds of the longest one so far

    def exceeded(self, values: Mapping[str, float]) -> Iterator[str]:
        """One line, once, where the iteration of these metrics could not have been saved."""
        self._checkpoint = max(self._checkpoint, values.get("time/checkpoint_s", 0.0))
        training = sum(values.get(f"time/{phase}_s", 0.0) for phase in TRAINING)
        needed = training + self._checkpoint
        if self._seconds is None or needed <= self._seconds:
            return
        yield (
            f"a stop would lose its iteration: torchrun kills ranks {self._seconds:g} s after it "
            f"passes SIGTERM or Ctrl-C on, and a stop may take {needed:.0f} s here (training "
            f"{training:.0f} s, checkpoint {self._checkpoint:.0f} s). Start it with `torchrun "
            f"--shutdown-timeout {60 * ceil(2 * needed / 60)}`"
        )
        self._seconds = None
