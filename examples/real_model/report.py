"""What the runs of a real model found: accuracy with its intervals, curves, seconds and memory.

python examples/real_model/report.py runs/real_model

Reads what run.sh left in <output>/<method> and <output>/gsm8k, writes <output>/report.md and
<output>/curves.png. Intervals are the evaluation's own: 95 %, bootstrapped over problems.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_rl.metrics.names import PHASES
from megatron_rl.metrics.plot import plot_run
from megatron_rl.metrics.writers import read_jsonl

Records = list[dict[str, Any]]
Interval = dict[str, float]  # value, low and high of a share

BENCHMARK, SECOND = "words", "gsm8k_short"
ACCURACY = "average_at_1"
STRETCH = 5  # iterations that a number of the curve is the mean of
CURVE = {
    "accuracy of the rollouts, %": ("reward/accuracy", 100, 1),
    "prompts with right and wrong responses, %": ("reward/groups_mixed_frac", 100, 0),
    "entropy, nats a token": ("rollout/entropy_estimate", 1, 2),
    "tokens a response": ("rollout/response_tokens_mean", 1, 1),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Tables and curves of the runs of a real model.")
    parser.add_argument("output", type=Path, help="where run.sh wrote to")
    output = parser.parse_args(arguments).output
    runs = {path.parent.name: path.parent for path in sorted(output.glob("*/metrics.jsonl"))}
    if not runs:
        print(f"error: {output}: no run. Start examples/real_model/run.sh first")
        return 1
    records = {name: read_jsonl(run / "metrics.jsonl") for name, run in runs.items()}
    evaluations = {name: held_out(run) for name, run in runs.items()}
    parts = [
        accuracy_table(evaluations),
        verdicts(evaluations),
        kinds_table(runs, output / "data" / "heldout.jsonl"),
        second_benchmark(output / "gsm8k"),
        *(curve_table(name, run) for name, run in records.items()),
        cost_table(records),
    ]
    (output / "report.md").write_text("\n\n".join("\n".join(part) for part in parts if part) + "\n")
    plot_run([(name, run / "metrics.jsonl") for name, run in runs.items()], output / "curves.png")
    print(output / "report.md")
    return 0


def held_out(run: Path) -> dict[int, dict[str, Interval]]:
    """Iteration -> measures of the held-out problems."""
    found = {}
    for path in sorted(run.glob("evaluation/summary_*.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        found[summary["iteration"]] = summary["benchmarks"][BENCHMARK]
    return found


def accuracy_table(evaluations: dict[str, dict[int, dict[str, Interval]]]) -> list[str]:
    iterations = sorted({iteration for each in evaluations.values() for iteration in each})
    titles = [f"after {iteration}" if iteration else "at the start" for iteration in iterations]
    lines = [
        f"| held-out accuracy, % | {' | '.join(titles)} | tokens a response | cut, % |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for name, measured in evaluations.items():
        cells = [percent(measured[at][ACCURACY]) if at in measured else "" for at in iterations]
        ends = [measured[min(measured)], measured[max(measured)]]
        tokens = " to ".join(f"{end['response_tokens_mean']['value']:.0f}" for end in ends)
        cut = " to ".join(f"{100 * end['truncated_frac']['value']:.0f}" for end in ends)
        lines.append(f"| {name} | {' | '.join(cells)} | {tokens} | {cut} |")
    return lines


def verdicts(evaluations: dict[str, dict[int, dict[str, Interval]]]) -> list[str]:
    """Whether the last interval lies above the first one."""
    lines = []
    for name, measured in evaluations.items():
        before, after = measured[min(measured)][ACCURACY], measured[max(measured)][ACCURACY]
        above = after["low"] > before["high"]
        lines.append(
            f"- {name}: the last interval {'lies' if above else 'does NOT lie'} above the "
            f"first: {percent(before)} before, {percent(after)} after"
        )
    return lines


def kinds_table(runs: dict[str, Path], problems: Path) -> list[str]:
    """Right answers to sums and to differences, evaluation by evaluation."""
    expressions = {row["prompt"]: row["expression"] for row in read_lines(problems)}
    lines = ["| right answers | sums | differences |", "|---|---|---|"]
    for name, run in runs.items():
        cells = []
        for sign in "+-":
            counts = []
            for path in sorted(run.glob(f"evaluation/{BENCHMARK}_*.jsonl")):
                asked = [row for row in read_lines(path) if sign in expressions[row["prompt"]]]
                counts.append(f"{sum(row['num_correct'] for row in asked)} of {len(asked)}")
            cells.append(", ".join(counts))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def second_benchmark(folder: Path) -> list[str]:
    """GSM8K at the start and after each method; nothing where run.sh left it out."""
    rows = []
    for path in sorted(folder.glob("*/evaluation/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        measured = summary["benchmarks"][SECOND]
        rows.append(
            f"| {path.parent.parent.name} | {measured['num_problems']} "
            f"| {percent(measured[ACCURACY])} | {percent(measured['truncated_frac'])} "
            f"| {measured['response_tokens_mean']['value']:.0f} |"
        )
    head = ["| GSM8K | problems | accuracy, % | cut, % | tokens a response |"]
    return [*head, "|---" * 5 + "|", *rows] if rows else []


def curve_table(name: str, run: Records) -> list[str]:
    """Means over stretches of iterations."""
    trained = [record for record in run if record["iteration"] > 0]
    stretches = [trained[at : at + STRETCH] for at in range(0, len(trained), STRETCH)]
    titles = [f"{part[0]['iteration']}-{part[-1]['iteration']}" for part in stretches]
    lines = [f"| {name}, iterations | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for title, (metric, scale, digits) in CURVE.items():
        cells = [f"{scale * mean(part, metric):.{digits}f}" for part in stretches]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def cost_table(records: dict[str, Records]) -> list[str]:
    """Seconds of the median iteration, the whole run and its evaluations, and memory."""
    shown = [phase for phase in PHASES if phase not in ("evaluation", "checkpoint")]
    titles = [
        *(f"{phase.replace('_', ' ')}, s" for phase in shown),
        *("iteration, s", "all iterations, min", "evaluations, min", "checkpoints, min"),
        *("peak memory of a rank, GiB", "trained tokens"),
    ]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, run in records.items():
        trained = [record for record in run if record["iteration"] > 0]
        cells = [
            *(f"{median(r.get(f'time/{phase}_s', 0.0) for r in trained):.1f}" for phase in shown),
            f"{median(alone(record) for record in trained):.1f}",
            f"{sum(alone(record) for record in trained) / 60:.1f}",
            *(
                f"{total(run, f'time/{phase}_s') / 60:.1f}"
                for phase in ("evaluation", "checkpoint")
            ),
            f"{max(record.get('memory/peak_gib', 0.0) for record in run):.1f}",
            f"{total(run, 'policy/trained_tokens'):,.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def alone(record: dict[str, Any]) -> float:
    """Seconds of an iteration without what is not done in each."""
    extra = sum(record.get(f"time/{phase}_s", 0.0) for phase in ("evaluation", "checkpoint"))
    return float(record["time/iteration_s"]) - float(extra)


def total(run: Records, metric: str) -> float:
    return float(sum(record.get(metric, 0.0) for record in run))


def mean(run: Records, metric: str) -> float:
    return total(run, metric) / len(run)


def percent(measured: Interval) -> str:
    value, low, high = (100 * measured[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
