"""How long a start takes, by part."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_rl.parallel.collectives import max_over


def seconds_since_start(stat: Path = Path("/proc/self/stat")) -> float:
    """Since this process began; 0 where the system does not say."""
    try:
        began = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


class StartTimes:
    """The parts that have ended, each since the one before; the first began with the process."""

    def __init__(self, clock: Callable[[], float] = seconds_since_start) -> None:
        self._clock = clock
        self._last = 0.0
        self._seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """This part ends here; it may go on later."""
        now = self._clock()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def line(self, group: dist.ProcessGroup) -> str:
        """One line for the console; every rank calls it.

        Example: `start-up: 14.2 s on the slowest rank: imports 5.1, inputs 1.0, ...`. Each part is
        of the rank that took longest for it, and ranks wait for each other, so that parts may add
        up to more than the whole.
        """
        slowest = max_over([*self._seconds.values(), self._last], group)
        parts = [
            f"{part} {seconds:.1f}" for part, seconds in zip(self._seconds, slowest, strict=False)
        ]
        return f"start-up: {slowest[-1]:.1f} s on the slowest rank: {', '.join(parts)}"
