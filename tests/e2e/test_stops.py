"""One run, stopped again and again as schedulers and people do it, ends as an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import asked_for
from training_runs import ROOT, TP2, exported, recipe_of

pytestmark = pytest.mark.slow

GRACE_S = 25.0  # torchrun kills what is left after 30
ITERATIONS = 60
MARK = "MEGATRON_RL_TEST_RUN"
STOPS = {  # what is sent, to whom, the exit code of torchrun
    "a scheduler's SIGTERM": (signal.SIGTERM, "torchrun", {1}),
    "Slurm's SIGUSR1": (signal.SIGUSR1, "torchrun", {-signal.SIGUSR1}),
    "the launcher is killed": (signal.SIGKILL, "torchrun", {-signal.SIGKILL}),
    "SIGUSR1 to one rank": (signal.SIGUSR1, "rank 1", {0}),
    "Ctrl-C": (signal.SIGINT, "everybody", {1, -signal.SIGINT, 130}),
}

EXHAUSTIVE = {"Slurm's SIGUSR1", "Ctrl-C"}
RESTART = "one rank is killed, and torchrun may restart"


@pytest.fixture(scope="module")
def stopped(request, runs):
    """What each stop left, and the folder of the run that was stopped, then let to its end."""
    seen = {name: stop(runs, *STOPS[name][:2]) for name in asked_for(request, "name")}
    seen[RESTART] = stop(runs, signal.SIGKILL, "rank 1", "--max-restarts", "1")
    runs.finish("undisturbed", 2, *SETTINGS)
    return seen


SETTINGS = (*TP2, f"run.num_iterations={ITERATIONS}", "checkpoint.save_every=2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.exhaustive if n in EXHAUSTIVE else ()) for n in STOPS],
)
def test_a_stop_saves_and_ends_in_time(stopped, name):
    seen = stopped[name]
    assert seen["code"] in STOPS[name][2], seen["said"]
    assert seen["seconds"] < GRACE_S
    assert seen["left"] == []
    assert "told to stop" in seen["said"]
    assert "stopped: " in seen["said"]
    assert "done: " not in seen["said"]
    assert seen["saved"] == seen["done"]  # nothing that was done is lost


def test_torchrun_restarts_and_the_run_goes_on_by_itself(stopped):
    seen = stopped[RESTART]
    assert seen["code"] == 0, seen["said"]
    assert seen["left"] == []
    assert seen["said"].count("resumed after iteration") == 2
    assert seen["saved"] == seen["done"] == ITERATIONS


def test_the_run_ends_as_an_undisturbed_one(runs, stopped):
    ends = [seen["done"] for seen in stopped.values()]
    assert sorted(set(ends)) == ends  # each start went on
    assert runs.records("stops") == runs.records("undisturbed")
    assert exported(runs.folder / "stops") == exported(runs.folder / "undisturbed")


def stop(runs: Any, number: signal.Signals, whom: str, *more: str) -> dict[str, Any]:
    """Start or go on with the run, send the signal after a save, and see what is left."""
    output, recipe = runs.folder / "stops", runs.folder / "stops.yaml"
    before = num_records(output)
    recipe.write_text(json.dumps(recipe_of(runs.folder / "models" / "qwen2", output)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *more]
    mark = f"{os.getpid()}"
    launcher = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "megatron_rl", "train", str(recipe), *SETTINGS],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: num_records(output) >= before + 3 or launcher.poll() is not None)
    processes = marked(mark)
    ranks = {rank: pid for pid, rank in processes.items() if rank is not None}
    start = time.monotonic()
    targets = {"torchrun": [launcher.pid], "rank 1": [ranks.get("1")]}
    for pid in targets.get(whom, list(processes)):
        os.kill(pid, number)
    said, _ = launcher.communicate(timeout=300)
    wait_until(lambda: not marked(mark), seconds=GRACE_S)
    checkpoints = [path.name for path in (output / "checkpoints").glob("iteration_*")]
    return {
        "code": launcher.returncode,
        "seconds": time.monotonic() - start,
        "left": list(marked(mark)),
        "said": said,
        "saved": max(int(name.removeprefix("iteration_")) for name in checkpoints),
        "done": num_records(output),
    }


def num_records(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(condition: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def marked(mark: str) -> dict[int, str | None]:
    """Processes that descend from a launcher, with their rank: all inherit its environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = dict(
                entry.partition("=")[::2] for entry in path.read_text(errors="replace").split("\0")
            )
        except OSError:
            continue
        if environment.get(MARK) == mark:
            found[int(path.parent.name)] = environment.get("RANK")
    return found
