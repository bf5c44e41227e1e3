"""A run whose iterations are traced: the files of its ranks, its words, and its weights."""

import gzip
import json
import re

import pytest
from training_runs import LAST, TP2, exported

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def traced(runs):
    """(name, what it said) of a run like straight_tp2 whose iterations 2 and 6 are traced."""
    return "traced", runs.finish("traced", 2, *TP2, "run.profile=[2,6]", "checkpoint.save_every=3")


def ranges(file):
    """Name -> microseconds of the ranges that a trace names."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return {e["name"]: e["dur"] for e in events if e.get("cat") == "user_annotation"}


def test_every_rank_writes_its_phases_and_operations(runs, traced):
    name, said = traced
    folder = runs.folder / name / "profile"
    assert f"profile: iterations 2 and 6 will be traced, each rank to a file in {folder}" in said
    assert sorted(file.name for file in folder.iterdir()) == [
        f"iteration_{iteration:06d}_rank_{rank:03d}.json.gz"
        for iteration in (2, 6)
        for rank in (0, 1)
    ]
    for file in folder.iterdir():
        found = ranges(file)
        whole = found[f"iteration {int(file.name[10:16])}"]
        phases = {"rollout", "reward", "logprob", "update", "weight_sync"}
        phases |= {"checkpoint"} if "000006" in file.name else set()
        assert phases <= found.keys()
        assert sum(found[phase] for phase in phases) <= whole  # they follow one another in it
        assert re.search(rb"aten::mm|megatron_rl::multiply_", gzip.decompress(file.read_bytes()))


def test_tracing_changes_no_bit(runs, traced, straight_tp2):
    name, _ = traced
    assert exported(runs.folder / name) == exported(runs.folder / straight_tp2)
    assert runs.records(name) == runs.records(straight_tp2)
    weights = {file: what for file, what in runs.files(name).items() if file.endswith(".distcp")}
    assert weights
    assert weights.items() <= runs.files(straight_tp2).items()


def test_a_run_that_goes_on_says_what_it_can_no_longer_trace(runs, traced):
    runs.copy("traced", "traced further")
    said = runs.finish(
        "traced further",
        2,
        *TP2,
        "run.num_iterations=7",
        "run.profile=[6,7]",
        "checkpoint.save_every=3",
    )
    assert (
        "profile: iteration 6 will not be traced, since the run goes on after iteration 6" in said
    )
    folder = runs.folder / "traced further" / "profile"
    assert len(list(folder.glob("iteration_000007_rank_*.json.gz"))) == 2


def test_a_run_without_traces_has_no_folder_for_them(runs, straight_tp2):
    assert (runs.folder / straight_tp2 / "checkpoints" / LAST).exists()
    assert not (runs.folder / straight_tp2 / "profile").exists()
