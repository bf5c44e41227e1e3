"""Curves of one or more runs on one page, from the metrics.jsonl files that training writes."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_rl.metrics import names
from megatron_rl.metrics.writers import read_jsonl

Curve = tuple[list[int], list[float]]  # iterations, values
History = Mapping[str, Curve]  # by metric name

# Okabe and Ito's palette, told apart with any colour vision; their yellow is too pale on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#555555"

PANELS = (
    ("Reward", "mean reward", ("reward/mean",)),
    ("Accuracy", "share correct", ("reward/accuracy",)),
    ("KL to the initial policy", "nats per token", ("policy/kl_initial_k1",)),
    ("Entropy", "nats per token", ("policy/entropy_mean", "rollout/entropy_estimate")),
    ("Response length", "tokens", ("rollout/response_tokens_mean",)),
    ("Kept responses", "share of those drawn", ("algorithms/kept_responses_frac",)),
)
"""Title, unit, metrics of a panel: of the metrics, the first that the run reported."""


def plot_run(runs: Sequence[tuple[str, Path]], output: Path) -> None:
    """Write a PNG of the runs, each given by its label and its metrics.jsonl."""
    figure = draw([(label, history(path)) for label, path in runs])
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")


def history(path: Path) -> History:
    """The curves of a metrics.jsonl, by iteration; numbers that were not finite are left out."""
    by_iteration = {record["iteration"]: record for record in read_jsonl(path)}
    curves: dict[str, Curve] = {}
    for iteration, record in sorted(by_iteration.items()):
        for name, value in record.items():
            if name != "iteration" and value is not None:
                iterations, values = curves.setdefault(name, ([], []))
                iterations.append(iteration)
                values.append(value)
    return curves


def draw(runs: Sequence[tuple[str, History]]) -> Figure:
    """Six panels; one colour per run, one marker per held-out benchmark."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [axes for row in figure.subplots(2, 3) for axes in row]
    benchmarks = sorted(
        {name for _, curves in runs for name in curves if names.is_evaluation(name)}
    )

    for axes, (title, unit, metrics) in zip(panels, PANELS, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("iteration")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        for run, (_, curves) in enumerate(runs):
            _draw_curve(axes, curves, metrics, run)
            if title == "Accuracy":
                _draw_benchmarks(axes, curves, benchmarks, run)
        if not axes.lines:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)

    handles = _legend(runs, benchmarks)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False
    )
    return figure


def _draw_curve(axes: Axes, curves: History, metrics: Sequence[str], run: int) -> None:
    name = next((name for name in metrics if name in curves), None)
    if name is not None:
        iterations, values = curves[name]
        marker = "." if len(values) < 3 else None  # a line of one point is invisible
        axes.plot(iterations, values, marker=marker, **_line_style(run), gid=name)


def _draw_benchmarks(axes: Axes, curves: History, benchmarks: Sequence[str], run: int) -> None:
    for name, marker in zip(benchmarks, cycle(MARKERS), strict=False):
        if name in curves:
            iterations, values = curves[name]
            style = {**_line_style(run), "linestyle": ":", "linewidth": 0.8, "markersize": 6}
            axes.plot(iterations, values, marker=marker, markeredgecolor="white", **style, gid=name)


def _legend(runs: Sequence[tuple[str, History]], benchmarks: Sequence[str]) -> list[Line2D]:
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
    """Colour first, then dashes once the colours are used up."""
    dashes = DASHES[run // len(COLORS) % len(DASHES)]
    return {"color": COLORS[run % len(COLORS)], "linestyle": dashes, "linewidth": 1.6}
