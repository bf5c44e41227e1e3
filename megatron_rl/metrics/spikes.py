"""Numbers of an iteration that lie far from those of the iterations before it."""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping

WATCHED = ("policy/grad_norm", "policy/loss", "critic/grad_norm", "critic/loss")
ITERATIONS = 50  # over which the median is taken
LEAST_ITERATIONS = 10  # before which nothing is called a spike
FACTOR = 10.0


class Spikes:
    """Compares each iteration with the median of the ones before it in this process."""

    def __init__(self) -> None:
        self._before: dict[str, deque[float]] = {name: deque(maxlen=ITERATIONS) for name in WATCHED}

    def of(self, values: Mapping[str, float]) -> Iterator[str]:
        """One line for each number that is ten usual distances away from the median.

        The usual distance is the median of the distances from it, and, of a number that is never
        negative, at least the median itself.
        """
        for name in WATCHED:
            value = values.get(name)
            if value is None or not math.isfinite(value):
                continue
            before = self._before[name]
            if len(before) >= LEAST_ITERATIONS:
                middle = statistics.median(before)
                usual = statistics.median(abs(one - middle) for one in before)
                if name.endswith("grad_norm"):
                    usual = max(usual, middle)
                if usual and abs(value - middle) > FACTOR * usual:
                    yield f"spike: {name} is {value:.4g}, where {middle:.4g} is usual"
            before.append(value)
