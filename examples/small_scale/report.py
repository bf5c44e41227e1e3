"""What the small-scale runs found: a table like the paper's, and the curves.

python examples/small_scale/report.py runs/small_scale

Reads <output>/<method>/seed<k>/metrics.jsonl, writes <output>/report.md and its figures. A value is
the mean over seeds, with the least and the largest in brackets.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_rl.metrics.plot import Against, History, history, plot_run, spent
from megatron_rl.metrics.writers import read_jsonl

Records = list[dict[str, Any]]

ACCURACY = "evaluation/arithmetic/average_at_16"
LAST = 10  # iterations that noisy numbers are averaged over
EARLY = 20
PAPER = ("raft", "raft_pp", "iterative_dpo", "reinforce", "grpo", "ppo")
ABLATIONS = (
    "reinforce",
    "reinforce_remove_all_wrong",
    "reinforce_remove_all_correct",
    "reinforce_rej",
    "reinforce_rej_norm",
    "reinforce_mean_zero",
    "grpo",
)
ROUNDS = ("grpo", "reinforce_rej", "dapo", "reinforce_ada")
FIGURES = {
    "methods": (PAPER, "iterations"),
    "methods_by_tokens": (PAPER, "tokens"),
    "ablations": (ABLATIONS, "iterations"),
    "rounds_by_tokens_drawn": (ROUNDS, "drawn"),
    "rounds_by_seconds": (ROUNDS, "seconds"),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Table and curves of the small-scale runs.")
    parser.add_argument("output", type=Path, help="where run.sh wrote to")
    output = parser.parse_args(arguments).output
    runs = find_runs(output)
    if not runs:
        print(f"error: {output}: no finished run. Start examples/small_scale/run.sh first")
        return 1
    records = {name: [read_jsonl(path) for path in paths] for name, paths in runs.items()}
    curves = {name: [history(path) for path in paths] for name, paths in runs.items()}
    lines = [*table(records), "", *costs(records), "", *at_equal_cost(curves), ""]
    (output / "report.md").write_text("\n".join(lines))
    for figure, (methods, against) in FIGURES.items():
        chosen = [(name, path) for name in methods for path in runs.get(name, ())]
        if chosen:
            plot_run(chosen, output / f"{figure}.png", against=against)
    print(output / "report.md")
    return 0


def find_runs(output: Path) -> dict[str, list[Path]]:
    """Method -> metrics of its finished seeds, the paper's methods first."""
    found: dict[str, list[Path]] = {}
    for finished in sorted(output.glob("*/seed*/finished")):
        found.setdefault(finished.parent.parent.name, []).append(finished.parent / "metrics.jsonl")
    order = dict.fromkeys((*PAPER, *ABLATIONS, *ROUNDS))
    return {name: found[name] for name in (*order, *sorted(found)) if name in found}


def table(records: dict[str, list[Records]]) -> list[str]:
    """Accuracy, distance and diversity of every method."""
    columns: dict[str, Callable[[Records], float]] = {
        f"average@16, iteration {EARLY}": lambda run: 100 * accuracy_at(run, EARLY),
        "at the end": lambda run: 100 * accuracy_at(run, run[-1]["iteration"]),
        "KL to initial, nats/token": lambda run: late(run, "policy/kl_initial_k1"),
        "points per nat": points_per_nat,
        "entropy, nats/token": lambda run: late(run, "policy/entropy_sampled"),
        f"entropy, iteration {EARLY}": lambda run: run[EARLY]["policy/entropy_sampled"],
        "kept responses": lambda run: mean(run, "algorithms/kept_responses_frac"),
    }
    digits = (1, 1, 4, 0, 4, 4, 2)
    lines = [f"| method | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, runs in records.items():
        cells = [
            spread([column(run) for run in runs], places)
            for column, places in zip(columns.values(), digits, strict=True)
        ]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return lines


def costs(records: dict[str, list[Records]]) -> list[str]:
    """What training cost: response tokens of the update's passes, of those that were sampled."""
    lines = ["| method | response tokens trained | of those sampled |", "|---|---|---|"]
    for name, runs in records.items():
        trained = [total(run, "policy/trained_tokens") for run in runs]
        shares = [
            count / total(run, "rollout/tokens") for count, run in zip(trained, runs, strict=True)
        ]
        lines.append(f"| {name} | {spread(trained, 0)} | {spread(shares, 2)} |")
    return lines


def at_equal_cost(curves: dict[str, list[History]]) -> list[str]:
    """Accuracy of each method after half and all of what the cheapest run of any has cost.

    Between two evaluations it is interpolated.
    """
    lines = [
        "| method | response tokens drawn | seconds | of them | average@16 |",
        "|---" * 5 + "|",
    ]
    axes: tuple[Against, ...] = ("drawn", "seconds")
    for name, runs in curves.items():
        totals = [spread([_total(run, axis) for run in runs], 0) for axis in axes]
        for axis in axes:
            least = min(_total(run, axis) for same in curves.values() for run in same)
            for part in (0.5, 1.0):
                budget = part * least
                found = [100 * accuracy_after(run, budget, axis) for run in runs]
                label = f"{budget:.0f} {'tokens' if axis == 'drawn' else 's'}"
                lines.append(
                    f"| {name} | {totals[0]} | {totals[1]} | {label} | {spread(found, 1)} |"
                )
    return lines


def _total(run: History, axis: Against) -> float:
    return spent(run, run[ACCURACY][0][-1:], axis)[0]


def accuracy_after(run: History, budget: float, axis: Against) -> float:
    """Accuracy when a run had cost so much."""
    iterations, values = run[ACCURACY]
    points = list(zip(spent(run, iterations, axis), values, strict=True))
    for (before, low), (after, high) in pairwise(points):
        if before <= budget <= after:
            return low + (high - low) * (budget - before) / max(after - before, 1e-9)
    return points[-1][1]


def accuracy_at(run: Records, iteration: int) -> float:
    return next(record[ACCURACY] for record in run if record["iteration"] == iteration)


def points_per_nat(run: Records) -> float:
    """Percentage points of accuracy gained per nat of KL to the initial policy."""
    gained = accuracy_at(run, run[-1]["iteration"]) - accuracy_at(run, 0)
    return 100 * gained / late(run, "policy/kl_initial_k1")


def late(run: Records, name: str) -> float:
    return mean(run[-LAST:], name)


def mean(run: Records, name: str) -> float:
    values = [record[name] for record in run if name in record]
    return sum(values) / len(values)


def total(run: Records, name: str) -> float:
    return sum(record.get(name, 0.0) for record in run)


def spread(values: Sequence[float], places: int) -> str:
    text = f"{sum(values) / len(values):.{places}f}"
    if len(values) == 1:
        return text
    return f"{text} [{min(values):.{places}f}, {max(values):.{places}f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
