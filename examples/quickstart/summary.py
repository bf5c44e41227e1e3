"""What the quickstart did, in a few lines: accuracy before and after, and where everything is."""

import argparse
from pathlib import Path
from typing import Any

from megatron_rl.metrics.writers import read_jsonl

ACCURACY = "evaluation/arithmetic/average_at_4"
PHASES = ("rollout", "reward", "logprob", "update", "weight_sync", "iteration")


def main() -> None:
    """Read the run's records and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    records = read_jsonl(output / "rl" / "metrics.jsonl")
    measured = [(r["iteration"], r[ACCURACY]) for r in records if ACCURACY in r]
    before, after = measured[0][1], measured[-1][1]
    print(f"held-out accuracy (average@4): {before:.1%} after the warm-up, {after:.1%} after RL")
    steady = records[len(records) // 2 :]
    means = {phase: mean_seconds(steady, phase) for phase in PHASES}
    means["iteration"] -= mean_seconds(steady, "evaluation")
    print("seconds per iteration: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items()))
    for what, path in (
        ("curves", "rl/plot.png"),
        ("metrics", "rl/metrics.jsonl"),
        ("responses, to read", "rl/rollouts.html"),
        ("held-out responses", "rl/evaluation/"),
        ("Hugging Face model", "rl/hf/"),
        ("resolved recipe", "rl/config.yaml"),
    ):
        print(f"  {what:20s} {output / path}")


def mean_seconds(records: list[dict[str, Any]], phase: str) -> float:
    return sum(float(record.get(f"time/{phase}_s", 0.0)) for record in records) / len(records)


if __name__ == "__main__":
    main()
