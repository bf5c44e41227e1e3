"""A full disk is called by its name, whatever the writer makes of it."""

import errno
import shutil
from types import SimpleNamespace

import pytest

from megatron_rl.errors import RunError
from megatron_rl.weights.room import Room

MIB = 1 << 20


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes are free."""

    def say(number):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=number))

    return say


def fails_with(error):
    def work():
        raise error

    return work


def test_a_save_that_does_not_fit_is_refused_before_it_begins(tmp_path, free):
    free(5 * MIB)
    Room("the checkpoint", tmp_path / "to be made", 5 * MIB).look()
    with pytest.raises(RunError) as refused:
        Room("the checkpoint", tmp_path, 5 * MIB + 1).look()
    assert "no space left on device: the checkpoint needs 5.0 MiB, 5.0 MiB are free" in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("error", "left", "is_full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 9 * MIB, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 9 * MIB, True),
        (RuntimeError("unexpected pos 704 vs 598"), 0, True),  # torch.save's, on a full disk
        (RuntimeError("unexpected pos 704 vs 598"), 9 * MIB, False),
        (OSError(errno.EIO, "Input/output error"), 9 * MIB, False),
        (KeyError("a fault of the program"), 0, False),
    ],
)
def test_an_error_while_writing(tmp_path, free, error, left, is_full):
    free(left)
    with pytest.raises(RunError if is_full else type(error)) as raised:
        Room("it", tmp_path, 7 * MIB).naming_full_disk(fails_with(error))
    if is_full:
        assert "no space left on device" in str(raised.value)
        assert raised.value.__cause__ is error
    else:
        assert raised.value is error


@pytest.mark.parametrize("error", [FileNotFoundError("policy"), RuntimeError("no parent")])
def test_a_directory_that_is_gone(tmp_path, error):
    with pytest.raises(RunError, match=r"runs/a: it is gone: somebody removed or renamed it"):
        Room("it", tmp_path / "runs" / "a").naming_full_disk(fails_with(error))


def test_what_is_said_already_is_not_said_again(tmp_path, free):
    free(0)
    first = RunError("no space left on device: first")
    with pytest.raises(RunError) as raised:
        Room("it", tmp_path, 7 * MIB).naming_full_disk(fails_with(first))
    assert raised.value is first
