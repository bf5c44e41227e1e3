"""Traces of whole iterations, where run.profile names them; elsewhere nothing is done."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from megatron_rl.metrics.unsaid import unsaid
from megatron_rl.parallel.collectives import all_gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.watchdog import Watchdog

FOLDER = "profile"  # of a run, in its directory
SAID = b"USDT:"  # that a trace begins, and that it ends; at a level above errors


class Profiler:
    """This rank's traces, one file for each iteration, to be read by Perfetto or chrome://tracing.

    A trace has the operations of the main thread and of autograd's, on a GPU its kernels too, and
    ranges with the names of the phases and of the iteration. It changes no result.
    """

    def __init__(
        self,
        iterations: Sequence[int],
        output_dir: Path,
        groups: Groups,
        say: Callable[[str], None],
        watchdog: Watchdog | None = None,
    ) -> None:
        """watchdog: is told when traces are written, which may take longer than an iteration."""
        self._iterations = tuple(sorted(set(iterations)))
        self._directory, self._groups = output_dir / FOLDER, groups
        self._say, self._watchdog = say, watchdog
        self._is_tracing = False

    def start_lines(self) -> Iterator[str]:
        """What a run will trace, for its start; nothing where it traces nothing."""
        if self._iterations:
            yield (
                f"profile: {_named(self._iterations)} will be traced, each rank to a file in "
                f"{self._directory}"
            )

    def resumed_lines(self, done_iterations: int) -> Iterator[str]:
        """What a run that goes on after some iterations can no longer trace."""
        past = [number for number in self._iterations if number <= done_iterations]
        if past:
            yield (
                f"profile: {_named(past)} will not be traced, since the run goes on after "
                f"iteration {done_iterations}"
            )

    def phase(self, name: str) -> AbstractContextManager[object]:
        """A context that is a range of that name, where an iteration is being traced."""
        return torch.profiler.record_function(name) if self._is_tracing else nullcontext()

    @contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """A context that is one iteration; every rank enters it.

        Its trace is written unless an error ends it, or `drop` was called. Where it runs out of a
        GPU's memory, the history of its allocations is written instead.
        """
        if number not in self._iterations:
            yield
            return
        is_cuda = self._groups.platform.device_type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        trace = torch.profiler.profile(activities=activities)
        with self._groups.platform.memory_history(self._file(number, "_memory.pickle")):
            with unsaid(SAID):
                trace.start()
            self._is_tracing = True
            try:
                with torch.profiler.record_function(f"iteration {number}"):
                    yield
                is_whole = self._is_tracing
            finally:
                self._is_tracing = False
                with unsaid(SAID):
                    trace.stop()
        if is_whole:
            with self._watchdog.phase("profile") if self._watchdog else nullcontext():
                self._write(trace, number)

    def drop(self) -> None:
        """The iteration at hand is not done as a whole, so its trace is not written."""
        self._is_tracing = False

    def _write(self, trace: torch.profiler.profile, number: int) -> None:
        """Every rank calls it; a trace that cannot be written is told, and ends nothing."""
        file, problem = self._file(number, ".json.gz"), ""
        unfinished = file.with_name(f".{file.name}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(unfinished))
            unfinished.replace(file)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            where = f"iteration {number} on rank {self._groups.rank}"
            problem = f"profile: no trace of {where}: {error}"
        for line in filter(None, all_gather_objects(problem, self._groups.world)):
            self._say(line)

    def _file(self, number: int, ending: str) -> Path:
        return self._directory / f"iteration_{number:06d}_rank_{self._groups.rank:03d}{ending}"


def _named(iterations: Sequence[int]) -> str:
    *first, last = map(str, iterations)
    return f"iterations {', '.join(first)} and {last}" if first else f"iteration {last}"
