"""Displays of a run in a terminal: notes at start-up, then progress, iteration by iteration."""

import os
import re
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_rl.metrics import names

Style = Literal["auto", "rich", "plain", "silent"]

ROWS_PER_HEADER = 20
ITERATIONS_PER_ESTIMATE = 10

_ESCAPE_SEQUENCE = re.compile(
    r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?", re.DOTALL
)


class Display(Protocol):
    """Shows a run on a stream; lives on global rank 0 only. Usable wherever a MetricsWriter is."""

    def say(self, message: str) -> None:
        """Show one line of text."""

    def write(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Column:
    header: str
    metrics: tuple[str, ...]  # the first that was reported is shown
    spec: str  # of format()
    width: int

    def text(self, values: Mapping[str, float]) -> str:
        """The number as people read it, "-" where no room reported one."""
        reported = (values[name] for name in self.metrics if name in values)
        value = next(reported, None)
        return "-" if value is None else format(value, self.spec)


COLUMNS = (
    Column("reward", ("reward/mean",), ".3f", 7),
    Column("accuracy", ("reward/accuracy",), ".1%", 8),
    Column("kept", ("algorithms/kept_responses_frac",), ".1%", 6),
    Column("kl", ("policy/kl_initial_k1", "policy/kl_initial_k3"), ".4f", 8),
    Column("entropy", ("policy/entropy_mean", "rollout/entropy_estimate"), ".3f", 7),
    Column("length", ("rollout/response_tokens_mean",), ".1f", 8),
    Column("loss", ("policy/loss",), ".4f", 8),
    Column("grad norm", ("policy/grad_norm",), ".3g", 9),
    Column("s/iter", ("time/iteration_s",), ".1f", 7),
)


def open_display(
    style: Style, total_iterations: int, *, done_iterations: int = 0, stream: TextIO | None = None
) -> Display:
    """The display of this style, counting on from done_iterations after a resume."""
    stream = stream or sys.stdout
    if style == "auto":
        is_terminal = stream.isatty() and os.environ.get("TERM", "") != "dumb"
        style = "rich" if is_terminal else "plain"
    if style == "rich":
        return RichDisplay(total_iterations, done_iterations, Console(file=stream, highlight=False))
    if style == "plain":
        return PlainDisplay(total_iterations, stream)
    return SilentDisplay()


class SilentDisplay:
    """Shows nothing."""

    def say(self, message: str) -> None:
        pass

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


SECONDS_BETWEEN_LINES = 1.0


class PlainDisplay:
    """One line per iteration, for logs; at most one a second, but for the last and evaluations."""

    def __init__(
        self,
        total_iterations: int,
        stream: TextIO,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stream = stream
        self._total = total_iterations
        self._clock = clock
        self._shown_at: float | None = None
        self._eta = TimeLeft(total_iterations, clock)

    def say(self, message: str) -> None:
        print(clean(message), file=self._stream, flush=True)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        shown = [
            f"{column.header} {text}" for column in COLUMNS if (text := column.text(values)) != "-"
        ]
        eta = self._eta.after(iteration, values)
        evaluated, now = evaluation_lines(values), self._clock()
        is_soon = self._shown_at is not None and now - self._shown_at < SECONDS_BETWEEN_LINES
        if is_soon and not evaluated and iteration != self._total:
            return
        self._shown_at = now
        self.say("  ".join([f"iteration {iteration}/{self._total}", *shown, f"eta {eta}"]))
        for line in evaluated:
            self.say(f"iteration {iteration}/{self._total}  {line}")

    def close(self) -> None:
        self._stream.flush()


class RichDisplay:
    """A progress bar that stays at the bottom, and above it one table row per iteration."""

    def __init__(
        self,
        total_iterations: int,
        done_iterations: int,
        console: Console,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console = console
        self._total = total_iterations
        self._eta = TimeLeft(total_iterations, clock)
        self._rows = 0
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=total_iterations, eta="-")
        self._progress.update(self._task, completed=done_iterations)
        self._is_live = False

    def say(self, message: str) -> None:
        self._print(clean(message))

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        if not self._is_live:  # the bar is not started earlier: notes at start-up need none
            self._progress.start()
            self._is_live = True
        if self._rows % ROWS_PER_HEADER == 0:
            header = [column.header.rjust(column.width) for column in COLUMNS]
            self._print(" ".join(["iteration", *header, "eta".rjust(8)]), style="bold")
        self._rows += 1

        eta = self._eta.after(iteration, values)
        cells = [column.text(values).rjust(column.width) for column in COLUMNS]
        self._print(" ".join([f"{iteration:9d}", *cells, eta.rjust(8)]))
        for line in evaluation_lines(values):
            self._print(" " * 10 + line, style="cyan")
        self._progress.update(self._task, completed=iteration, eta=eta)

    def close(self) -> None:
        if self._is_live:
            self._progress.stop()
            self._is_live = False

    def _print(self, line: str, style: str = "") -> None:
        # Text, not str: rich must not read markup in a model's name or an answer
        self._console.print(Text(line, style=style), soft_wrap=True)


class TimeLeft:
    """Estimates the time until the end of the run from the pace of its last iterations."""

    def __init__(self, total_iterations: int, clock: Callable[[], float]) -> None:
        self._total = total_iterations
        self._clock = clock
        self._last = clock()
        self._seconds: deque[float] = deque(maxlen=ITERATIONS_PER_ESTIMATE)

    def after(self, iteration: int, values: Mapping[str, float]) -> str:
        """The time left after an iteration (they count from 1), as [days]d h:mm:ss.

        "-" after the evaluation at the start, which is iteration 0: it tells no pace.
        """
        now = self._clock()
        if iteration == 0:
            self._last = now
            return "-"
        self._seconds.append(values.get("time/iteration_s", now - self._last))
        self._last = now
        mean = sum(self._seconds) / len(self._seconds)
        minutes, seconds = divmod(round(mean * max(self._total - iteration, 0)), 60)
        hours, minutes = divmod(minutes, 60)
        days, hours = divmod(hours, 24)
        return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{seconds:02d}"


def evaluation_lines(values: Mapping[str, float]) -> list[str]:
    """Lines with the held-out accuracies among the values, one for each benchmark."""
    return [
        clean(f"held-out {names.evaluation_label(name)} {value:.1%}")
        for name, value in values.items()
        if names.is_evaluation(name)
    ]


def clean(text: str) -> str:
    """The text on one line without anything that steers a terminal or reorders what it shows."""
    text = _ESCAPE_SEQUENCE.sub("", text)
    text = "".join(" " if character in "\n\r\t\u2028\u2029" else character for character in text)
    # Cc and Cf: control and format characters (bidirectional marks); Cs: lone surrogates
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
