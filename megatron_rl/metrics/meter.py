"""One object that collects an iteration's numbers from all rooms and gives them out at its end."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from megatron_rl.metrics import tally
from megatron_rl.metrics.names import meaning
from megatron_rl.metrics.profiler import Profiler
from megatron_rl.metrics.timers import PhaseTimer
from megatron_rl.parallel.collectives import max_over, sum_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.watchdog import Watchdog
from megatron_rl.types import RolloutGroup, Verdict

RATES = (
    ("rollout/tokens_per_s", "rollout/tokens", ("time/sampling_s", "time/rollout_s")),
    ("policy/tokens_per_s", "policy/trained_tokens", ("time/update_s",)),
)
"""(metric, tokens that it counts, seconds that it divides them by: the first that there are)."""


class Meter:
    """The numbers of the iteration at hand; every rank has a meter, and all meters agree.

    A room reports what it measured while the loop runs; `take` ends the iteration. A name that is
    reported twice keeps the later value.
    """

    def __init__(
        self,
        groups: Groups,
        watchdog: Watchdog | None = None,
        profiler: Profiler | None = None,
    ) -> None:
        """watchdog, profiler: are told of every phase."""
        self._groups, self._watchdog, self._profiler = groups, watchdog, profiler
        self._timer = PhaseTimer(synchronize=groups.platform.synchronize)
        self._values: dict[str, float] = {}
        self._memory: dict[str, int] = {}  # in use at the end of a phase
        self.verdicts: Counter[Verdict] = Counter()
        """How often each was passed since the start of this process, over all ranks."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Bill the time inside to a phase of metrics/names.PHASES."""
        watched = self._watchdog.phase(name) if self._watchdog else nullcontext()
        traced = self._profiler.phase(name) if self._profiler else nullcontext()
        with watched, traced, self._timer.phase(name):
            yield
        used = self._groups.platform.used_memory_bytes()
        self._memory[name] = max(used, self._memory.get(name, 0))

    def begin(self, iteration: int) -> None:
        """Phases belong to this iteration from now on."""
        if self._watchdog is not None:
            self._watchdog.begin(iteration)

    def progress(self) -> None:
        """The phase at hand has come further, which a watchdog wants to know."""
        if self._watchdog is not None:
            self._watchdog.progress()

    def report(self, values: Mapping[str, float]) -> None:
        """Add metrics that are equal on all ranks.

        Raises:
            ValueError: a name that metrics/names.py gives no meaning.
        """
        for name in values:
            if meaning(name) is None:
                raise ValueError(f"metric {name!r}: has no meaning. Add it to metrics/names.py")
        self._values.update(values)

    def count(
        self, groups: Sequence[RolloutGroup], parts: Sequence[str] = ()
    ) -> dict[Verdict, int]:
        """Report everything that was drawn; gives back how often each verdict was passed.

        Every rank calls it with its own groups; the answer is about all of them. parts: the named
        parts of the reward.
        """
        counts, longest = tally.count(groups, parts)
        world = self._groups.world
        total = dict(zip(tally.names(parts), sum_over(counts, world), strict=True))
        self.report(tally.metrics(total, max_over([longest], world)[0]))
        verdicts = {verdict: int(total[f"verdict_{verdict}"]) for verdict in Verdict}
        self.verdicts.update(verdicts)
        return verdicts

    def take(self) -> dict[str, float]:
        """All metrics since the last take, with times of the slowest rank; every rank calls it."""
        times = self._timer.take()
        peak = float(self._groups.platform.peak_memory_bytes())
        memory = {f"memory/{name}_gib": float(used) for name, used in self._memory.items()}
        memory["memory/peak_gib"] = peak
        largest = max_over([*times.values(), *memory.values()], self._groups.world)
        values = {
            **self._values,
            **dict(zip(times, largest[: len(times)], strict=True)),
            **{n: v / 2**30 for n, v in zip(memory, largest[len(times) :], strict=True)},
        }
        self._values, self._memory = {}, {}
        return values | _derived(values)

    def restart(self) -> None:
        """Forget what was measured so far: start-up is not part of the first iteration."""
        self._timer.take()
        self._values, self._memory = {}, {}


def _derived(values: Mapping[str, float]) -> dict[str, float]:
    """Metrics that follow from others."""
    derived = {
        name: values[tokens] / values[seconds]
        for name, tokens, choices in RATES
        for seconds in [name for name in choices if values.get(name)][:1]
        if values.get(tokens)
    }
    # A loss or reward with a KL measures it on every response; then nothing measures it apart.
    for form in ("k1", "k3"):
        name = f"policy/kl_initial_{form}"
        if name not in values and f"policy/kl_ref_{form}" in values:
            derived[name] = values[f"policy/kl_ref_{form}"]
    return derived
