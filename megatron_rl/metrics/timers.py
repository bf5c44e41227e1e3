"""Timing of the phases of an iteration."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_rl.metrics.names import PHASES


def _no_wait() -> None:
    """Do nothing: a device without a queue has nothing to wait for."""


class PhaseTimer:
    """Adds up seconds per phase until they are taken.

    Example: `with timer.phase("update"): ...`, twice in an iteration, then `timer.take()` gives
    {"time/update_s": both together, "time/iteration_s": since the last take}.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = _no_wait,
    ) -> None:
        """Measure by `clock`, in seconds.

        synchronize waits for the device's queue, so that work is billed to the phase that queued
        it. Cost: one device synchronization at both ends of every phase.
        """
        self._clock = clock
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self._iteration_start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time is billed to a phase of PHASES, also when an exception ends it."""
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}: must be one of {', '.join(PHASES)}")
        self._synchronize()
        start = self._clock()
        try:
            yield
        finally:
            self._synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last take and of the whole iteration; starts anew."""
        now = self._clock()
        values = {f"time/{name}_s": self._seconds[name] for name in PHASES if name in self._seconds}
        values["time/iteration_s"] = now - self._iteration_start
        self._seconds = {}
        self._iteration_start = now
        return values
