"""A run on a full disk says so, keeps what it has, and goes on where room is made."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import run_on_ranks
from training_runs import build, error_of, everywhere

pytestmark = pytest.mark.slow

SMALL = "checkpoint.save_every=1", "run.num_iterations=4"
MOMENTS = 10


@pytest.fixture(params=["16m"])
def small_disk(runs, request):
    """A file system in memory of this size, in the place of a run's directory."""
    place = runs.folder / "small disk"
    place.mkdir(exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={request.param}", "tmpfs"]
    mounted = subprocess.run(["mount", *options, place], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_named_and_costs_nothing(runs, small_disk):
    """A checkpoint takes 7 MiB: two fit into 16, a third beside them does not."""
    code, said = runs.train("small disk", 1, *SMALL)
    assert code == 1, said
    assert said.count("no space left on device: the checkpoint needs ") == 1
    assert "Traceback" not in said
    kept = sorted(path.name for path in (small_disk / "checkpoints").iterdir())
    assert kept == ["iteration_000001", "iteration_000002"]  # and nothing half written
    shutil.rmtree(small_disk / "checkpoints" / "iteration_000001")
    said = runs.finish("small disk", 1, *SMALL, "checkpoint.keep_last=1")
    assert "resumed after iteration 2" in said


@pytest.mark.parametrize(
    "small_disk",
    [
        "8k",
        pytest.param("16k", marks=pytest.mark.exhaustive),
        "24k",
    ],
    indirect=True,
)
def test_a_disk_that_is_full_before_the_first_save(runs, small_disk):
    """In the files of a start, and in the records of the first iteration."""
    settings = (*SMALL, "metrics.rollouts_every=1")
    code, said = runs.train("small disk", 1, *settings)
    assert code in (1, 2), said
    assert "megatron-rl: error: [Errno 28] No space left on device" in said
    assert "Traceback" not in said
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    runs.finish("small disk", 1, *settings)
    assert [record["iteration"] for record in runs.records("small disk")] == [1, 2, 3, 4]


@pytest.mark.parametrize("small_disk", ["64m"], indirect=True)
@pytest.mark.parametrize("async_save", [False, True], ids=["waited for", "async_save"])
def test_a_disk_that_fills_up_at_any_moment_of_a_save(runs, small_disk, async_save):
    """As if somebody else took the room just then: what was looked for before is left out."""
    out = runs.folder / "moments.json"
    run_on_ranks(2, fill_at_every_moment, runs.folder, small_disk, async_save, out)
    found = json.loads(out.read_text())
    assert len(found["errors"]) == MOMENTS
    for errors in found["errors"]:
        assert any(error.startswith("RunError: ") for error in errors)
        assert all("no space left on device: the " in error for error in errors)
    assert found["left"] == [["iteration_000001"]] * MOMENTS
    assert found["faults"] == [None] * MOMENTS
    assert found["next start"] == {"goes on from": 1, "then saves": True}


# -- on the ranks ----------------------------------------------------------------------------------


def fill_at_every_moment(folder: Path, disk: Path, async_save: bool, out: Path) -> None:
    import torch.distributed as dist

    from megatron_rl.checkpoint.manifest import fault_of
    from megatron_rl.checkpoint.store import CheckpointStore
    from megatron_rl.weights.room import Room

    run = build(folder / "models" / "qwen2", disk / "run", 2, 1)
    config = run.config.checkpoint.model_copy(update={"async_save": async_save})
    directory, filler, is_main = disk / "run" / "checkpoints", disk / "filler", dist.get_rank() == 0

    def save(iteration: int) -> None:
        store.save(iteration, run.models, {"iteration": iteration}, run._model_files)
        store.finish()

    def leave_free(num_bytes: int | None) -> None:
        if is_main:
            filler.unlink(missing_ok=True)
            if num_bytes is not None:
                with filler.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - num_bytes)
        dist.barrier()

    before = shutil.disk_usage(disk).free
    store = CheckpointStore(directory, run.groups, config)
    save(1)
    taken = before - shutil.disk_usage(disk).free
    found: dict[str, Any] = {"errors": [], "left": [], "faults": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Room, "look", lambda _: None)
        for moment in range(MOMENTS):
            leave_free(taken * moment // MOMENTS)
            store = CheckpointStore(directory, run.groups, config)
            found["errors"].append(everywhere(error_of(lambda: save(2), Exception)))
            found["left"].append(sorted(path.name for path in directory.iterdir()))
            found["faults"].append(fault_of(directory / "iteration_000001", slice(None)))
    leave_free(None)
    store = CheckpointStore(directory, run.groups, config)
    state = store.load(run.models)
    save(2)
    found["next start"] = {
        "goes on from": state and state["iteration"],
        "then saves": (directory / "iteration_000002").exists(),
    }
    if is_main:
        out.write_text(json.dumps(found))
