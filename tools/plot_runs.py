"""Plots runs side by side.

python tools/plot_runs.py RUN [RUN ...] --output FILE.png [--against tokens]

A RUN is a run's directory or a metrics.jsonl; LABEL=RUN names it in the legend. Runs of one label
are drawn as their mean, in a band from the least to the largest.
"""

import argparse
import sys
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.metrics.plot import plot_run
from megatron_rl.metrics.writers import JSONL_NAME


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Plot the curves of one or more runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="[LABEL=]directory or metrics.jsonl")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.png")
    parser.add_argument(
        "--against", choices=("iterations", "tokens"), default="iterations", help="horizontal axis"
    )
    options = parser.parse_args(arguments)
    try:
        runs = [labelled(run) for run in options.runs]
        plot_run(runs, options.output, against=options.against)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
