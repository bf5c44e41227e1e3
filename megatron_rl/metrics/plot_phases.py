"""Where the seconds of iterations go, and what runs at the same time, from metrics.jsonl files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_rl.errors import InputError
from megatron_rl.metrics.plot import COLORS, History, band, history

STACKED = ("rollout", "reward", "logprob", "update", "weight_sync")
"""Phases of the ranks that train, one after the other, in the order of the loop."""

SAMPLING = "time/sampling_s"
WHOLE = "time/iteration_s"


def plot_phases(runs: Sequence[tuple[str, Path]], output: Path) -> None:
    """Write a PNG with a panel for each label; runs of one label are drawn as their mean.

    Raises:
        InputError: a file has no seconds.
    """
    repeated: dict[str, list[History]] = {}
    for label, path in runs:
        found = history(path)
        if WHOLE not in found:
            raise InputError(f"{path}: no {WHOLE}. Give a metrics.jsonl that training wrote")
        repeated.setdefault(label, []).append(found)
    figure = draw_phases(list(repeated.items()))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")


def draw_phases(runs: Sequence[tuple[str, Sequence[History]]]) -> Figure:
    """Phases stacked on each other; above them, up to the line, what no phase counts.

    What ranks that only sample need is a line of its own: where it lies inside of the stack, both
    ran at once, and where `rollout` is nearly nothing, nobody waited for them.
    """
    figure = Figure(figsize=(12, 1.2 + 2.9 * len(runs)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (label, same) in zip(panels, runs, strict=True):
        axes.set_title(label, loc="left", fontsize=11)
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.25)
        _draw_stack(axes, same)
        for name, style, told in ((WHOLE, "-", "whole iteration"), (SAMPLING, "--", "sampling")):
            if any(name in run for run in same):
                x, mean, _, _ = band(same, name)
                told += " of separate ranks" if name == SAMPLING else ""
                axes.plot(x, mean, style, color="#000000", linewidth=1.4, label=told, gid=name)
    panels[-1].set_xlabel("iteration")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    return figure


def _draw_stack(axes: Axes, runs: Sequence[History]) -> None:
    iterations, _, _, _ = band(runs, WHOLE)
    below = [0.0] * len(iterations)
    for phase, color in zip(STACKED, COLORS, strict=False):
        name = f"time/{phase}_s"
        x, mean, _, _ = band(runs, name)
        seconds = dict(zip(x, mean, strict=True))  # a phase that an iteration leaves out has none
        above = [low + seconds.get(at, 0.0) for at, low in zip(iterations, below, strict=True)]
        if seconds:
            told = "rollout, or the wait for it" if phase == "rollout" else phase.replace("_", " ")
            axes.fill_between(
                iterations, below, above, color=color, alpha=0.75, linewidth=0, label=told, gid=name
            )
        below = above
