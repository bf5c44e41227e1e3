"""One directory, one run: a lock that ends with its process, whatever ended that."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.errors import InputError

LOCK = ".lock"
WAIT_FOR_A_LEAVING_RUN_S, SECONDS_BETWEEN_LOOKS = 600.0, 0.5
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """The lock of a run's directory; the main rank holds it to the end of its process.

    It is a POSIX lock of the file `.lock`, which the kernel drops with the process and no child
    inherits. The file says who holds it, for the message to others. On a file system without such
    locks that entry alone decides.
    """

    def __init__(self, directory: Path, say: Callable[[str], None]) -> None:
        """Take the lock; the directory is made where it is not there.

        Raises:
            InputError: a live run holds it.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / LOCK
        self._file = self._path.open("a+", encoding="utf-8")
        before = self._holder()
        waited = 0.0
        while not self._taken(before):
            if not _is_leaving(before) or waited > WAIT_FOR_A_LEAVING_RUN_S:
                raise InputError(
                    f"run.output_dir={str(directory)!r}: another run writes into it: "
                    f"{_described(before)}. Let it end, stop it with `kill {before.get('pid')}` "
                    f"there, or name another directory{self._way_out_of_a_copy(before)}"
                )
            if not waited:
                say(f"waiting for {_described(before)} to save and end")
            waited += SECONDS_BETWEEN_LOOKS
            time.sleep(SECONDS_BETWEEN_LOOKS)
            before = self._holder()
        if before:
            say(f"took over the lock of {_described(before)}: that process is gone")
        self._write(_here())

    def release(self) -> None:
        """Say that nobody holds it; the kernel's lock ends with the process."""
        self._write({})

    def _taken(self, before: dict[str, Any]) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return not before or (_is_here(before) and not _is_alive(before))
            return False
        return True

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        with contextlib.suppress(ValueError):
            holder = json.loads(self._file.read() or "{}")
            if isinstance(holder, dict):
                return holder
        return {}

    def _write(self, holder: dict[str, Any]) -> None:
        self._file.seek(0)
        self._file.truncate()
        if holder:
            self._file.write(json.dumps(holder) + "\n")
        self._file.flush()

    def _way_out_of_a_copy(self, holder: dict[str, Any]) -> str:
        if _is_here(holder):
            return ""
        return f". If that machine is gone and its lock stayed, remove {self._path}"


def _here() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "launcher": os.getppid(),
        "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has not said who it is"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _is_here(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname()


def _is_alive(holder: dict[str, Any]) -> bool:
    """True where that process is there, and not another one that got its number."""
    return _born(holder.get("pid")) == holder.get("born") is not None


def _is_leaving(holder: dict[str, Any]) -> bool:
    """True where the holder is about to end: it said so, or what had started it is gone."""
    if not holder:
        return True
    if not _is_here(holder) or not _is_alive(holder):
        return False
    parent = _stat(holder.get("pid"), 1)
    return parent is not None and parent != holder.get("launcher")


def _born(pid: object) -> int | None:
    """When a process was started, in ticks since the machine was; None where there is none."""
    return _stat(pid, 19)


def _stat(pid: object, number: int) -> int | None:
    """A field behind the name of the program in /proc/PID/stat, from 0; see proc(5)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[number])
    except (OSError, ValueError, IndexError):
        return None
