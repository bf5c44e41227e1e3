"""What may stand in a run's directory, or become of it while the run writes into it."""

import shutil
import subprocess
import threading
import time

import pytest

pytestmark = pytest.mark.slow


def test_checkpoints_that_are_a_file(runs):
    (runs.folder / "a file").mkdir()
    (runs.folder / "a file" / "checkpoints").write_text("mine")
    code, said = runs.train("a file", 1)
    assert code == 2, said
    assert "checkpoints' is no directory. Move it, or name another directory" in said
    assert "Traceback" not in said
    assert [path.name for path in (runs.folder / "a file").iterdir()] == ["checkpoints"]


def test_a_directory_that_cannot_be_written(runs):
    place = runs.folder / "read only"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "ro", "tmpfs"]
    mounted = subprocess.run(["mount", *options, place], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        code, said = runs.train("read only", 1)
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert code == 2, said
    assert "megatron-rl: error: [Errno 30] Read-only file system" in said
    assert "Traceback" not in said


def test_a_directory_that_is_removed_meanwhile(runs):
    """Else it would be made again, without what was recorded so far."""
    directory = runs.folder / "removed"

    def remove() -> None:
        while not (directory / "metrics.jsonl").exists():
            time.sleep(0.02)
        while directory.exists():
            shutil.rmtree(directory, ignore_errors=True)

    thread = threading.Thread(target=remove)
    thread.start()
    code, said = runs.train("removed", 1, "checkpoint.save_every=1", "run.num_iterations=300")
    thread.join()
    assert code == 1, said
    assert "it is gone: somebody removed or renamed it" in said
    assert "Traceback" not in said
    assert not directory.exists()
