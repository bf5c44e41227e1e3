"""Curves of one or more runs on one page, from the metrics.jsonl files that training writes.

Runs of the same label are repetitions with other seeds: one curve, their mean, in a band from the
least to the largest.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_rl.errors import InputError
from megatron_rl.metrics import names
from megatron_rl.metrics.writers import read_jsonl

Curve = tuple[list[int], list[float]]  # iterations, values
History = Mapping[str, Curve]  # the curves of one run, by metric name
Repeated = Sequence[History]  # the runs of one label
Against = Literal["iterations", "tokens", "drawn", "seconds"]

# Okabe and Ito's palette, told apart with any colour vision; their yellow is too pale on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#555555"

PANELS = (
    ("Reward", "mean reward", ("reward/mean",)),
    ("Accuracy", "share correct", ("reward/accuracy",)),
    ("KL to the initial policy", "nats per token", ("policy/kl_initial_k1",)),
    # The estimate is over everything sampled, so runs that train on different responses compare.
    (
        "Entropy",
        "nats per token",
        ("rollout/entropy_estimate", "policy/entropy_sampled", "policy/entropy_mean"),
    ),
    ("Response length", "tokens", ("rollout/response_tokens_mean",)),
    ("Kept responses", "share of those drawn", ("algorithms/kept_responses_frac",)),
)
"""Title, unit and metrics of each panel, which shows the first of its metrics that was reported."""


X_LABELS: dict[Against, str] = {
    "iterations": "iteration",
    "tokens": "response tokens trained",
    "drawn": "response tokens drawn",
    "seconds": "seconds of training, without evaluations",
}
COSTS: dict[Against, tuple[str, ...]] = {
    "tokens": ("policy/trained_tokens",),
    "drawn": ("rollout/tokens",),
    "seconds": tuple(
        f"time/{phase}_s" for phase in ("rollout", "reward", "logprob", "update", "weight_sync")
    ),
}
"""Metrics whose sum over the iterations so far is the horizontal axis."""


def plot_run(
    runs: Sequence[tuple[str, Path]], output: Path, *, against: Against = "iterations"
) -> None:
    """Write a PNG of the runs, each given by its label and its metrics.jsonl."""
    repeated: dict[str, list[History]] = {}
    for label, path in runs:
        repeated.setdefault(label, []).append(history(path))
    figure = draw(list(repeated.items()), against=against)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")


def history(path: Path) -> History:
    """The curves of a metrics.jsonl, by iteration; numbers that were not finite are left out."""
    by_iteration = {record["iteration"]: record for record in read_jsonl(path)}
    curves: dict[str, Curve] = {}
    for iteration, record in sorted(by_iteration.items()):
        for name, value in record.items():
            if name != "iteration" and value is not None:
                if not isinstance(value, int | float):
                    raise InputError(
                        f"{path}: iteration {iteration}: {name}={ascii(value)[:60]} is not a "
                        "number. Give a metrics.jsonl that training wrote"
                    )
                iterations, values = curves.setdefault(name, ([], []))
                iterations.append(iteration)
                values.append(value)
    return curves


def band(
    runs: Repeated, name: str, against: Against = "iterations"
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(x, mean, least, largest) of a metric, at the iterations at which all runs measured it."""
    curves = [dict(zip(*run[name], strict=True)) for run in runs if name in run]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    columns = [[curve[iteration] for curve in curves] for iteration in shared]
    positions: list[list[float]] = [[float(iteration)] for iteration in shared]
    if against in COSTS:
        costs = [spent(run, shared, against) for run in runs if name in run]
        positions = [list(column) for column in zip(*costs, strict=True)]
    return (
        [sum(column) / len(column) for column in positions],
        [sum(column) / len(column) for column in columns],
        [min(column) for column in columns],
        [max(column) for column in columns],
    )


def spent(run: History, iterations: Sequence[int], against: Against) -> list[float]:
    """What a run had cost by the end of each of these iterations."""
    counted = [
        pair for name in COSTS[against] for pair in zip(*run.get(name, ([], [])), strict=True)
    ]
    return [sum(count for at, count in counted if at <= iteration) for iteration in iterations]


def draw(runs: Sequence[tuple[str, Repeated]], *, against: Against = "iterations") -> Figure:
    """A figure of six panels; one colour per label, one marker per held-out benchmark."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [axes for row in figure.subplots(2, 3) for axes in row]
    benchmarks = sorted(
        {name for _, same in runs for run in same for name in run if names.is_evaluation(name)}
    )

    for axes, (title, unit, metrics) in zip(panels, PANELS, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(X_LABELS[against])
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        for number, (_, same) in enumerate(runs):
            _draw_curve(axes, same, metrics, number, against)
            if title == "Accuracy":
                _draw_benchmarks(axes, same, benchmarks, number, against)
        if not axes.lines:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)

    handles = _legend(runs, benchmarks)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False
    )
    return figure


def _draw_curve(
    axes: Axes, runs: Repeated, metrics: Sequence[str], number: int, against: Against
) -> None:
    name = next((name for name in metrics if any(name in run for run in runs)), None)
    if name is not None:
        x, mean, least, largest = band(runs, name, against)
        marker = "." if len(mean) < 3 else None  # a line of one point is invisible
        axes.plot(x, mean, marker=marker, **_line_style(number), gid=name)
        if len(runs) > 1:
            color = _line_style(number)["color"]
            axes.fill_between(x, least, largest, color=color, alpha=0.15, linewidth=0, gid=name)


def _draw_benchmarks(
    axes: Axes, runs: Repeated, benchmarks: Sequence[str], number: int, against: Against
) -> None:
    for name, marker in zip(benchmarks, cycle(MARKERS), strict=False):
        if any(name in run for run in runs):
            x, mean, least, largest = band(runs, name, against)
            style = {**_line_style(number), "linestyle": ":", "linewidth": 0.8, "markersize": 6}
            axes.plot(x, mean, marker=marker, markeredgecolor="white", **style, gid=name)
            if len(runs) > 1:
                axes.vlines(x, least, largest, color=style["color"], linewidth=0.8)


def _legend(runs: Sequence[tuple[str, Repeated]], benchmarks: Sequence[str]) -> list[Line2D]:
    lines = [Line2D([], [], label=label, **_line_style(i)) for i, (label, _) in enumerate(runs)]
    points = [
        Line2D(
            [], [], linestyle="", marker=marker, color=GREY,
            label=f"held-out {names.evaluation_label(name)}",
        )
        for name, marker in zip(benchmarks, cycle(MARKERS), strict=False)
    ]  # fmt: skip
    return lines + points


def _line_style(run: int) -> dict[str, Any]:
    """A line's style: another colour for each run, and dashes once the colours are used up."""
    dashes = DASHES[run // len(COLORS) % len(DASHES)]
    return {"color": COLORS[run % len(COLORS)], "linestyle": dashes, "linewidth": 1.6}
