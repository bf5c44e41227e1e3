"""A rank that hangs, fails or dies is named, and ends the whole job within seconds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import PP2, ROOT, TP2, recipe_of

pytestmark = pytest.mark.slow

MIN_S = 5.0
SETTINGS = (
    f"watchdog.min_s={MIN_S}",
    "watchdog.factor=1",
    "checkpoint.save_every=1",
    "run.num_iterations=30",
)
FAULTY = Path(__file__).parent / "faulty_train.py"
HANGS = {  # what the message says of the place
    ("sleeps", "update", TP2): "faulty_train.py",
    ("computes", "rollout", ()): "faulty_train.py",
    ("is_stopped", "checkpoint", PP2): "was stopped by a signal",
}
FAILURES = {
    ("raises", "checkpoint", TP2): "KeyError: 'a row that is not there'",
    ("raises", "update", PP2): "KeyError: 'a row that is not there'",
    ("is_killed", "rollout", TP2): "is gone: it was killed",
}


def run(runs, fault, place, layout):
    """(exit code, what was said, seconds since the fault struck)."""
    name = f"{fault} {place}"
    recipe, output = runs.folder / f"{name}.yaml", runs.folder / name
    recipe.write_text(json.dumps(recipe_of(runs.folder / "models" / "qwen2", output)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2"]
    moment = runs.folder / f"{name}.moment"
    done = subprocess.run(
        [*torchrun, FAULTY, fault, place, moment, "train", recipe, *SETTINGS, *layout],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    return done.returncode, done.stdout, time.time() - moment.stat().st_mtime


@pytest.mark.parametrize(
    ("fault", "place", "layout"), HANGS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_rank_that_stands_still_is_named_with_its_stack(runs, fault, place, layout):
    code, said, seconds = run(runs, fault, place, layout)
    assert code == 1, said
    assert said.count("megatron-rl: error: ") == 1, said
    assert f"iteration 3, {place} (deadline 5 s" in said
    (line,) = [line for line in said.splitlines() if line.startswith("  stuck: ")]
    assert line.startswith("  stuck: rank 1, process ")
    _, _, stacks = said.partition("  stack of rank 1, innermost last:\n")
    assert HANGS[fault, place, layout] in stacks.partition("  stack of rank 0")[0], said
    assert "waiting for it: ranks 0" in said
    # torchrun itself takes some of it.
    assert seconds < MIN_S + 10 + 5


@pytest.mark.parametrize(
    ("fault", "place", "layout"), FAILURES, ids=lambda part: part if isinstance(part, str) else ""
)
def test_a_rank_that_fails_ends_all_with_its_own_words(runs, fault, place, layout):
    code, said, seconds = run(runs, fault, place, layout)
    assert code == 1, said
    assert said.count("megatron-rl: error: ") == 1, said
    assert FAILURES[fault, place, layout] in said
    assert f"iteration 3, {place}" in said
    assert "Connection closed by peer" not in said
    assert seconds < 10
