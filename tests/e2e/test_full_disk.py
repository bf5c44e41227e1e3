"""A run on a full disk says so, keeps what it has, and goes on where room is made."""

import shutil
import subprocess

import pytest

pytestmark = pytest.mark.slow

SMALL = "checkpoint.save_every=1", "run.num_iterations=4"


@pytest.fixture
def small_disk(runs):
    """A file system in memory, in the place of a run's directory."""
    place = runs.folder / "small disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=16m", "tmpfs"]
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
