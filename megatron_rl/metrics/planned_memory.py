"""What a run holds in memory beside what its plan said that it would."""

from collections.abc import Iterator, Mapping


class PlannedMemory:
    """Compares the memory of iterations with the plan of the busiest rank."""

    def __init__(
        self, planned: Mapping[str, float], largest: str = "", *, margin: float = 1.0
    ) -> None:
        """planned: GiB at the "peak", and where engine and trainer take turns on a device also at
        the end of the phases "rollout" and "update"; nothing: there is no plan. largest: its
        largest parts, in words. margin: the plan is exceeded where more than so many times it is
        held.
        """
        self._planned, self._largest, self._margin = dict(planned), largest, margin
        self._is_told = self._is_exceeded = False

    def metrics(self) -> dict[str, float]:
        """The plan, to be recorded beside what is measured."""
        return {f"memory/planned_{name}_gib": gib for name, gib in self._planned.items()}

    def compared(self, values: Mapping[str, float]) -> Iterator[str]:
        """One line after the first iteration, and one, once, where more is held than planned."""
        found = {
            name: (values[f"memory/{name}_gib"], gib)
            for name, gib in self._planned.items()
            if f"memory/{name}_gib" in values
        }
        if not found:
            return
        if not self._is_told:
            self._is_told = True
            parts = (f"{name} {gib:.2f} of {planned:.2f}" for name, (gib, planned) in found.items())
            yield f"memory: GiB on a rank, of those planned: {', '.join(parts)}"
        over = [name for name, (gib, planned) in found.items() if gib > self._margin * planned]
        if over and not self._is_exceeded:
            self._is_exceeded = True
            gib, planned = found[over[0]]
            yield (
                f"memory: {gib:.2f} GiB on a rank ({over[0]}) are more than the {planned:.2f} that "
                f"were planned; the largest parts of the plan are {self._largest}. Longer "
                "sequences, or a larger batch, may not fit"
            )
