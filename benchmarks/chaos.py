"""Runs that are killed and stopped again and again, beside undisturbed twins.

    python benchmarks/chaos.py --faults 300 --seed 1 --folder /tmp/chaos \
        --output benchmarks/results/chaos.md

A chain is one run: it is started with torchrun, a fault strikes, the same command is started again,
until the run ends by itself. Who is struck, by what and when is drawn from the seed. Then the chain
must equal its twin, which nobody disturbed: metrics, exported weights, and every file of the newest
checkpoint but random states and the index, bit for bit; and no process may be left. Finished chains
are kept in FOLDER/chains.jsonl, and the same command goes on behind them; a line that is taken out
is run again.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launched import (
    make_model,
    marked,
    num_records,
    ranks_of,
    recipe_of,
    records,
    start,
    wait_until,
)

ITERATIONS = 12
SECONDS_TO_END = 60.0  # torchrun takes up to 30 where it has to kill
SECONDS_OF_A_START = 300.0
MOST_FAULTS_OF_A_CHAIN = 8
SFT = {"algorithm": {"preset": "sft"}}
BESIDE = {"async_save": True}
COIN = {"reward": {"kind": "tests.e2e.coin_reward:is_even"}}  # the model knows nothing yet


@dataclass(frozen=True)
class Case:
    """A run at a layout."""

    name: str
    ranks: int
    sections: dict[str, Any]


def _parallel(tp: int, pp: int) -> dict[str, Any]:
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return {"parallel": sizes}


CASES = (
    Case("supervised, TP 2", 2, {**SFT, **_parallel(2, 1)}),
    Case("supervised, DP 2", 2, SFT),
    Case("supervised, PP 2", 2, {**SFT, **_parallel(1, 2)}),
    Case("supervised, TP 2 x DP 2", 4, {**SFT, **_parallel(2, 1)}),
    Case("PPO, DP 2", 2, {"algorithm": {"preset": "ppo"}, "rollout": {"group_size": 1}, **COIN}),
    Case("iterative DPO, DP 2", 2, {"algorithm": {"preset": "iterative_dpo"}, **COIN}),
    Case("supervised, TP 2, saves beside", 2, {**SFT, **_parallel(2, 1), "checkpoint": BESIDE}),
)
FAULTS = {  # name: signal, and whom it strikes
    "SIGKILL to one rank": (signal.SIGKILL, "rank"),
    "SIGKILL to all": (signal.SIGKILL, "all"),
    "SIGKILL to torchrun": (signal.SIGKILL, "torchrun"),
    "SIGTERM to torchrun": (signal.SIGTERM, "torchrun"),
    "SIGTERM to one rank": (signal.SIGTERM, "rank"),
    "SIGUSR1 to torchrun": (signal.SIGUSR1, "torchrun"),
    "SIGUSR1 to one rank": (signal.SIGUSR1, "rank"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    model = make_model(options.folder / "model")
    path = options.folder / "chains.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    while sum(len(chain["faults"]) for chain in done) < options.faults:
        numbers = {chain["number"] for chain in done}
        number = next(number for number in itertools.count() if number not in numbers)
        case = CASES[number % len(CASES)]
        chain = run_chain(case, model, options.folder, f"{options.seed}/{number}")
        chain["number"] = number
        done.append(chain)
        with path.open("a") as file:
            file.write(json.dumps(chain) + "\n")
        print(f"{case.name}: {len(chain['faults'])} faults, {chain['verdict']}", flush=True)
    text = report(done, options.seed)
    print(text)
    if options.output:
        options.output.write_text(text)


def run_chain(case: Case, model: Path, folder: Path, seed: str) -> dict[str, Any]:
    """Disturb one run until it ends, and compare it with its twin."""
    draw = random.Random(seed)
    twin = folder / f"twin {case.name}"
    if not (twin / "hf").exists():
        shutil.rmtree(twin, ignore_errors=True)
        log = folder / f"{twin.name}.log"
        code = start(recipe(case, model, twin), case.ranks, log, mark=twin.name).wait()
        assert code == 0, log.read_text()
    output, log = folder / "chain", folder / f"chain {seed.replace('/', '-')}.log"
    shutil.rmtree(output, ignore_errors=True)
    faults: list[dict[str, Any]] = []
    for attempt in range(MOST_FAULTS_OF_A_CHAIN + 1):
        mark = f"{seed}/{attempt}/{os.getpid()}"
        before = num_records(output)
        launcher = start(recipe(case, model, output), case.ranks, log, mark=mark)
        fault = None
        if attempt < MOST_FAULTS_OF_A_CHAIN:
            fault = strike(draw, launcher, output, before, mark)
        problem = end_of(launcher, mark, SECONDS_TO_END if fault else SECONDS_OF_A_START)
        if fault:
            faults.append(fault)
        if problem:
            return verdict(case, faults, f"{problem}, see {log.name}")
        if (output / "hf").exists() and num_records(output) == ITERATIONS:
            return verdict(case, faults, compared(output, twin))
    return verdict(case, faults, f"does not end, see {log.name}")


def end_of(launcher: subprocess.Popen[bytes], mark: str, seconds: float) -> str:
    """Wait for the end of all processes; what is wrong with it, or nothing."""
    if not wait_until(lambda: launcher.poll() is not None, seconds):
        return "hangs"
    if not wait_until(lambda: not marked(mark), SECONDS_TO_END):
        return f"leaves processes {sorted(marked(mark))}"
    return ""


def strike(
    draw: random.Random,
    launcher: subprocess.Popen[bytes],
    output: Path,
    before: int,
    mark: str,
) -> dict[str, Any] | None:
    """Wait for a moment, and send a signal; None where the run ended before."""
    name = draw.choice(sorted(FAULTS))
    number, whom = FAULTS[name]
    iteration = 0 if draw.random() < 0.1 else draw.randint(1, 3)
    delay = draw.uniform(0.0, 6.0 if iteration == 0 else 0.7)
    if iteration:  # else it strikes while ranks start
        wait_until(
            lambda: num_records(output) >= before + iteration or launcher.poll() is not None,
            SECONDS_OF_A_START,
        )
    time.sleep(delay)
    if launcher.poll() is not None:
        return None
    processes = marked(mark)
    ranks = list(ranks_of(mark))
    draw.shuffle(ranks)
    if not ranks:
        whom = "torchrun"  # it has not started them yet
    targets = {"torchrun": [launcher.pid], "all": list(processes), "rank": ranks[:1]}
    for pid in targets[whom]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return None
    return {"fault": name, "iteration": num_records(output), "delay": round(delay, 2)}


def recipe(case: Case, model: Path, output: Path) -> dict[str, Any]:
    checkpoint = {"save_every": 1, **case.sections.get("checkpoint", {})}
    return recipe_of(model, output, ITERATIONS, **{**case.sections, "checkpoint": checkpoint})


def compared(output: Path, twin: Path) -> str:
    """What differs from the twin; "equal" where nothing does."""
    if records(output) != records(twin):
        return "other metrics"
    for name in sorted(path.relative_to(twin) for path in (twin / "hf").rglob("*.safetensors")):
        if (output / name).read_bytes() != (twin / name).read_bytes():
            return f"another {name}"
    manifests = [
        json.loads(
            (folder / "checkpoints" / f"iteration_{ITERATIONS:06d}" / "MANIFEST.json").read_text()
        )
        for folder in (output, twin)
    ]
    files = [
        {
            name: entry
            for name, entry in manifest["files"].items()
            if not name.startswith("rank_") and not name.endswith(".metadata")
        }
        for manifest in manifests
    ]
    return "equal" if files[0] == files[1] else "another checkpoint"


def verdict(case: Case, faults: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return {"case": case.name, "faults": faults, "verdict": text}


def report(chains: Sequence[dict[str, Any]], seed: int) -> str:
    """A page of all chains."""
    faults = [fault for chain in chains for fault in chain["faults"]]
    lines = [
        "# Kills and stops",
        "",
        f"`benchmarks/chaos.py --faults {len(faults)} --seed {seed}`: {len(faults)} faults in "
        f"{len(chains)} runs of {ITERATIONS} iterations, each started again by the same command "
        "until it ended. Compared with a twin that nobody disturbed: metrics, exported weights and "
        "the newest checkpoint, bit for bit.",
        "",
        "| run | chains | faults | equal to the twin |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        own = [chain for chain in chains if chain["case"] == case.name]
        equal = sum(chain["verdict"] == "equal" for chain in own)
        struck = sum(len(chain["faults"]) for chain in own)
        lines.append(f"| {case.name} | {len(own)} | {struck} | {equal} |")
    lines += ["", "| fault | times |", "|---|---|"]
    counted = Counter(fault["fault"] for fault in faults)
    lines += [f"| {name} | {counted[name]} |" for name in FAULTS]
    bad = [chain for chain in chains if chain["verdict"] != "equal"]
    lines += ["", *(f"- {chain['case']}: {chain['verdict']}" for chain in bad)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
