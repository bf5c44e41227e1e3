"""Conversions that end early: killed, out of disk, stopped; and that the next one makes it good."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conversion_models import are_equal, read_tensors, save_tensors, to_hf, to_megatron, write_model

import megatron_rl.conversion.partial as partial_module
import megatron_rl.conversion.to_hf as to_hf_module
import megatron_rl.conversion.to_megatron as to_megatron_module
from megatron_rl.conversion.partial import JOURNAL, PartialOutput
from megatron_rl.errors import InputError
from megatron_rl.weights.tensor_file import TensorFileWriter

FILE_BYTES = 5000  # of safetensors: several files


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    to_hf(converted, folder, file_bytes=FILE_BYTES)
    return folder


def in_a_process(work: Callable[..., None], *args: Any) -> int:
    """The exit code of work in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def killed_at(owner: Any, name: str, call: int, work: Callable[..., Any], *args: Any) -> None:
    """Do work, and die without a word when a function is called for the n-th time."""
    stock, calls = getattr(owner, name), []

    def counted(*its_args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(*its_args, **kwargs)

    with mock.patch.object(owner, name, counted):
        work(*args)


STAGES_IN = {
    "first chunk": (to_megatron_module, "append_chunk", 1),
    "in a layer": (to_megatron_module, "append_chunk", 15),
    "before the first line of the journal": (PartialOutput, "_append", 1),
    "before a file is in the journal": (PartialOutput, "_append", 4),
    "before the index": (to_megatron_module, "write_metadata", 1),
    "before the check": (to_megatron_module, "MegatronCheckpoint", 1),
    "before the last fsync": (partial_module, "sync_tree", 1),
    "before the name": (Path, "rename", 1),
    "before the journal's end": (Path, "unlink", 1),
    "between name and tracker": (to_megatron_module, "_name_newest", 1),
    "in the tracker": (Path, "rename", 2),
}
STAGES_OUT = {
    "first record": (TensorFileWriter, "write", 1),
    "in the third file": (TensorFileWriter, "write", 30),
    "before a file is in the journal": (PartialOutput, "_append", 3),
    "before the index": (to_hf_module, "write_index", 1),
    "before the name": (Path, "rename", 1),
}


@pytest.mark.parametrize("stage", STAGES_IN)
def test_killed_on_the_way_in_and_started_again(model, converted, tmp_path, stage):
    output = tmp_path / "megatron"
    killed = in_a_process(killed_at, *STAGES_IN[stage], to_megatron, model, output)
    assert killed == -signal.SIGKILL
    final, tracker = output / "iter_0000001", output / "latest_checkpointed_iteration.txt"
    assert not tracker.exists()
    if final.exists():  # it is whole
        assert {**contents(final), JOURNAL: b""} == {**contents(converted), JOURNAL: b""}
    kept = finished_files(output / "iter_0000001.partial")
    to_megatron(model, output)
    assert contents(final) == contents(converted)
    assert tracker.read_text() == "1"
    assert sorted(path.name for path in output.iterdir()) == [final.name, tracker.name]
    for name, (inode, changed) in kept.items():  # what was finished was not made again
        found = (final / name).stat()
        assert (found.st_ino, found.st_mtime_ns) == (inode, changed)
    # The last file may be on its way to the disk.
    assert len(kept) >= {"in a layer": 1, "before the index": 4}.get(stage, 0)


def finished_files(partial: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of the files in the journal."""
    if not (partial / JOURNAL).exists():
        return {}
    lines = [json.loads(line) for line in (partial / JOURNAL).read_text().splitlines()]
    stats = {line["file"]: (partial / line["file"]).stat() for line in lines if "file" in line}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.mark.parametrize("stage", STAGES_OUT)
def test_killed_on_the_way_out_and_started_again(converted, exported, tmp_path, stage):
    output = tmp_path / "hf"

    def export() -> None:
        to_hf(converted, output, file_bytes=FILE_BYTES)

    assert in_a_process(killed_at, *STAGES_OUT[stage], export) == -signal.SIGKILL
    assert not output.exists()
    kept = finished_files(tmp_path / "hf.partial")
    export()
    assert contents(output) == contents(exported)
    for name, (inode, changed) in kept.items():
        found = (output / name).stat()
        assert (found.st_ino, found.st_mtime_ns) == (inode, changed)
    assert len(kept) >= {"in the third file": 1, "before the index": 3}.get(stage, 0)


def with_small_files(limit: int, work: Callable[..., Any], *args: Any) -> None:
    """Work on a disk that takes files of at most `limit` bytes; 0: it said what it had to."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        work(*args)
    except InputError as error:
        os._exit(0 if "make room, and run the same command again" in str(error) else 3)
    os._exit(4)


def test_a_disk_that_is_full_on_the_way_in(model, converted, tmp_path):
    """The embedding's file fits, a layer's does not."""
    sizes = {path.name: path.stat().st_size for path in converted.glob("*.distcp")}
    limit = sizes["__0_0000.distcp"] + 1000
    assert limit < sizes["__0_0001.distcp"]
    output = tmp_path / "megatron"
    assert in_a_process(with_small_files, limit, to_megatron, model, output) == 0
    assert not (output / "iter_0000001").exists()
    to_megatron(model, output)
    assert contents(output / "iter_0000001") == contents(converted)


def test_a_disk_that_is_full_on_the_way_out(converted, exported, tmp_path):
    output = tmp_path / "hf"
    sizes = sorted(path.stat().st_size for path in exported.glob("*.safetensors"))
    assert sizes[0] + 100 < sizes[-1]

    def export() -> None:
        to_hf(converted, output, file_bytes=FILE_BYTES)

    assert in_a_process(with_small_files, sizes[0] + 100, export) == 0
    assert not output.exists()
    export()
    assert contents(output) == contents(exported)


def test_a_disk_that_fails_after_the_last_write(converted, tmp_path):
    """What is written is brought to disk behind the conversion; its error is not lost."""
    full = OSError(errno.ENOSPC, "No space left on device")
    failing = mock.patch.object(partial_module, "sync", side_effect=full)
    with failing, pytest.raises(InputError, match=r"No space left on device.*same command again"):
        to_hf(converted, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    to_hf(converted, tmp_path / "hf")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(model, converted, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    message = r"megatron/iter_0000001\.partial: 0\.00 GiB more disk space is needed"
    with mock.patch("shutil.disk_usage", return_value=usage):
        with pytest.raises(InputError, match=message):
            to_megatron(model, tmp_path / "megatron")
        with pytest.raises(InputError, match="more disk space is needed"):
            to_hf(converted, tmp_path / "hf")
    assert not list(tmp_path.rglob("*.distcp")) + list(tmp_path.rglob("*.safetensors"))


def stopped(model, output):
    """A conversion with everything finished but its index."""
    interrupt = mock.patch.object(
        to_megatron_module, "write_metadata", side_effect=KeyboardInterrupt
    )
    with interrupt, pytest.raises(KeyboardInterrupt):
        to_megatron(model, output)
    return output / "iter_0000001.partial"


def test_a_source_that_changed_is_converted_from_the_start(model, tmp_path):
    shutil.copytree(model, tmp_path / "hf")
    partial = stopped(tmp_path / "hf", tmp_path / "megatron")
    assert len(finished_files(partial)) == 5
    shutil.rmtree(tmp_path / "hf")
    tensors = write_model("qwen2", tmp_path / "hf")  # the same sizes; another time of change
    tensors["model.norm.weight"].add_(1)
    save_tensors(tmp_path / "hf", tensors)
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert are_equal(read_tensors(tmp_path / "back"), tensors)


def test_other_options_start_again(model, converted, tmp_path):
    stopped(model, tmp_path / "megatron")
    to_megatron(model, tmp_path / "megatron", dtype=torch.bfloat16)
    to_hf(tmp_path / "megatron", tmp_path / "back")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "back").values()} == {torch.bfloat16}


@pytest.mark.parametrize("damage", ["cut line", "cut file", "no file"])
def test_what_does_not_stand_as_it_was_finished_is_made_again(model, converted, tmp_path, damage):
    partial = stopped(model, tmp_path / "megatron")
    if damage == "cut line":
        journal = partial / JOURNAL
        journal.write_bytes(journal.read_bytes()[:-20])
    elif damage == "cut file":
        os.truncate(partial / "__0_0002.distcp", 100)
    else:
        (partial / "__0_0002.distcp").unlink()
    to_megatron(model, tmp_path / "megatron")
    assert contents(tmp_path / "megatron" / "iter_0000001") == contents(converted)


def test_a_file_that_is_made_again_counts_when_it_is_finished(converted, exported, tmp_path):
    """Its space is taken at once, so that its size says nothing."""
    output, partial = tmp_path / "hf", tmp_path / "hf.partial"

    def export() -> None:
        to_hf(converted, output, file_bytes=FILE_BYTES)

    in_a_process(killed_at, *STAGES_OUT["before the index"], export)
    first = sorted(finished_files(partial))[0]
    os.truncate(partial / first, 100)
    in_a_process(killed_at, TensorFileWriter, "write", 2, export)
    assert (partial / first).stat().st_size == (exported / first).stat().st_size
    export()
    assert contents(output) == contents(exported)


def test_a_directory_of_somebody_elses_is_left_alone(model, tmp_path):
    notes = tmp_path / "out.partial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(InputError, match=r"out\.partial: it is not of a conversion"):
        PartialOutput(tmp_path / "out", {})
    assert notes.read_text() == "mine"


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    with PartialOutput(tmp_path / "out", {}), pytest.raises(InputError, match="another process"):
        PartialOutput(tmp_path / "out", {})
