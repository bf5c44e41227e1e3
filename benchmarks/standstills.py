"""A rank that hangs, in every phase of an iteration at every layout, and how soon it is named.

    python benchmarks/standstills.py --folder /tmp/standstills \
        --output benchmarks/results/standstills.md [--every-kind]

In the third iteration rank 1 falls asleep in Python, computes in C without end (keeping Python's
lock), or is stopped by SIGSTOP. Without --every-kind each phase meets the three kinds at three
layouts, one at each; with it, all three at each. The message must name rank, iteration and phase,
and all must be over within the deadline and 10 s, and 5 s for torchrun itself. Finished runs are
kept in FOLDER/runs.jsonl, and the same command goes on behind them.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launched import DATA, ROOT, make_model, marked, recipe_of, start, wait_until

FAULTY = ROOT / "tests" / "e2e" / "faulty_train.py"
KINDS = ("sleeps", "computes", "is_stopped")
PHASES = {  # what the message calls it: where it strikes
    "rollout": "engine step",
    "reward": "reward",
    "logprob": "logprob",
    "update": "update",
    "weight_sync": "weight_sync",
    "evaluation": "evaluation",
    "checkpoint": "checkpoint",
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2, rollout TP 2": {
        "parallel": {"tensor_model_parallel_size": 2},
        "rollout": {"tensor_model_parallel_size": 2},
    },
    "DP 2": {},
    "PP 2, rollout TP 2": {
        "parallel": {"pipeline_model_parallel_size": 2},
        "rollout": {"tensor_model_parallel_size": 2},
    },
}
MIN_S = 10.0
SECONDS_TO_END = MIN_S + 10 + 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every-kind", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    model = make_model(options.folder / "model")
    path = options.folder / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(run["phase"], run["layout"], run["kind"]) for run in done}
    for case in cases(every_kind=options.every_kind):
        if case in known:
            continue
        done.append(run_case(*case, model, options.folder))
        with path.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(json.dumps(done[-1]), flush=True)
    text = report(done)
    print(text)
    if options.output:
        options.output.write_text(text)


def cases(*, every_kind: bool) -> list[tuple[str, str, str]]:
    """(phase, layout, kind) of every run."""
    return [
        (phase, layout, kind)
        for row, phase in enumerate(PHASES)
        for column, layout in enumerate(LAYOUTS)
        for number, kind in enumerate(KINDS)
        if every_kind or number == (row + column) % len(KINDS)
    ]


def run_case(phase: str, layout: str, kind: str, model: Path, folder: Path) -> dict[str, Any]:
    output, log = folder / "run", folder / f"{phase} {layout} {kind}.log"
    shutil.rmtree(output, ignore_errors=True)
    log.unlink(missing_ok=True)
    sections = {
        "algorithm": {"preset": "reinforce_rej"},
        "evaluation": {
            "benchmarks": {
                "arithmetic": {"path": str(DATA / "heldout.jsonl"), "max_problems": 8},
            },
            "samples": 1,
            "every": 1,
        },
        "checkpoint": {"save_every": 1},
        "watchdog": {"min_s": MIN_S, "factor": 1},
        **LAYOUTS[layout],
    }
    sections["rollout"] = {"group_size": 4, **sections.get("rollout", {})}
    recipe = recipe_of(model, output, 4, **sections)
    mark = f"{folder}/{phase}/{layout}/{kind}"
    moment = folder / "moment"
    moment.unlink(missing_ok=True)
    program = [str(FAULTY), kind, PHASES[phase], str(moment)]
    launcher = start(recipe, 2, log, mark=mark, program=program)
    is_there = wait_until(lambda: launcher.poll() is not None, 600)
    over = time.time() - moment.stat().st_mtime
    is_clean = wait_until(lambda: not marked(mark), 10)
    said = log.read_text()
    wanted = (
        said.count("megatron-rl: error: ") == 1,
        f"iteration 3, {phase} (deadline" in said,
        "  stuck: rank 1, process " in said,
    )
    verdict = "named" if is_there and is_clean and all(wanted) else f"see {log.name}"
    if over > SECONDS_TO_END:
        verdict += ", late"
    return {
        "phase": phase,
        "layout": layout,
        "kind": kind,
        "seconds": round(over, 1),
        "verdict": verdict,
    }


def report(runs: Sequence[dict[str, Any]]) -> str:
    """A page of all runs."""
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        by_case.setdefault((run["phase"], run["layout"]), []).append(run)
    lines = [
        "# Ranks that hang",
        "",
        f"`benchmarks/standstills.py`: rank 1 of 2 hangs in the third iteration; {len(runs)} runs. "
        f"With `watchdog.min_s={MIN_S:g}`: seconds from the fault to the end of torchrun, of which "
        f"at most {SECONDS_TO_END:g} are wanted. Every message but those marked names rank, "
        "iteration and phase, once.",
        "",
        "| phase | " + " | ".join(LAYOUTS) + " |",
        "|---" * (len(LAYOUTS) + 1) + "|",
    ]
    for phase in PHASES:
        cells = [
            ", ".join(
                f"{run['kind']} {run['seconds']} s"
                + ("" if run["verdict"] == "named" else f" ({run['verdict']})")
                for run in by_case.get((phase, layout), [])
            )
            for layout in LAYOUTS
        ]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
