"""`megatron-rl plot`: the curves of runs, side by side.

megatron-rl plot RUN [RUN ...] --output FILE.png [--against drawn | --phases]

A RUN is a run's directory or a metrics.jsonl; LABEL=RUN names it in the legend. Runs of one label
are drawn as their mean, in a band from the least to the largest. --phases shows where the seconds
of iterations went in the place of curves, and what ran at the same time.
"""

import argparse
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.metrics.writers import JSONL_NAME

AXES = (
    "iterations",
    "tokens",
    "drawn",
    "seconds",
)  # X_LABELS of metrics/plot.py, which imports matplotlib


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("runs", nargs="+", metavar="RUN", help="[LABEL=]directory or metrics.jsonl")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.png")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--against", choices=AXES, default="iterations", help="horizontal axis")
    what.add_argument("--phases", action="store_true", help="seconds of each phase of iterations")


def run(options: argparse.Namespace) -> int:
    runs = [labelled(text) for text in options.runs]
    if options.phases:
        from megatron_rl.metrics.plot_phases import plot_phases

        plot_phases(runs, options.output)
    else:
        from megatron_rl.metrics.plot import plot_run

        plot_run(runs, options.output, against=options.against)
    print(options.output)
    return 0


def labelled(run: str) -> tuple[str, Path]:
    """Label and file of a RUN: "grpo=runs/7" -> ("grpo", runs/7/metrics.jsonl)."""
    label, equals, location = run.rpartition("=")
    if not equals or Path(run).exists():
        label, location = "", run
    path = Path(location)
    if path.is_dir():
        path /= JSONL_NAME
    if not path.is_file():
        raise InputError(
            f"{run!r}: no file {path}. Give a run's directory, which holds {JSONL_NAME} "
            "if metrics.jsonl was true"
        )
    return label or (path.parent.name if path.name == JSONL_NAME else path.stem), path
