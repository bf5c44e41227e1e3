"""An output directory that is complete or not there; stopped work goes on where it was.

Files are made in `<name>.partial`. Each finished file is a line of the journal there, appended when
the file is on disk, and a second start makes only files that have no line. At the end one rename
gives the directory its name.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_rl.errors import InputError
from megatron_rl.weights.disk import sync, sync_tree

JOURNAL = "journal.jsonl"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Progress(Protocol):
    """Is told how far a conversion is; a bar in the terminal, for example."""

    def begin(self, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...


class PartialOutput:
    """A context in which an output is made; without complete() the work stays for the next start.

    The journal is locked within the context, so that two processes do not write one output.
    """

    def __init__(self, final: Path, identity: Mapping[str, Any]) -> None:
        """Open or make the partial directory.

        Args:
            final: the directory to make.
            identity: all that the output depends on, as JSON. Files of another identity are
                discarded.

        Raises:
            InputError: final exists already, or another process is making it.
        """
        if final.exists():
            raise InputError(f"{final}: it is there already. Remove it, or choose another output")
        self._final = final
        self.directory = final.with_name(f"{final.name}.partial")
        self.directory.mkdir(parents=True, exist_ok=True)
        if any(self.directory.iterdir()) and not (self.directory / JOURNAL).is_file():
            raise InputError(
                f"{self.directory}: it is not of a conversion, whose place it has. Move it away"
            )
        self._journal = (self.directory / JOURNAL).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{self.directory}: another process is writing it") from error
        self.finished = self._read_journal(json.loads(json.dumps(identity)))
        self._keeper = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> "PartialOutput":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._keeper.shutdown()
        self._journal.close()
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise InputError(
                f"{self.directory}: {error.strerror}. What is finished is kept: make room, and run "
                "the same command again"
            ) from error

    def require_space(self, total_bytes: int) -> None:
        """Check that the disk can hold total_bytes, of which the finished files are a part.

        Raises:
            InputError: it cannot.
        """
        done = sum((self.directory / name).stat().st_size for name in self.finished)
        missing = total_bytes - done - shutil.disk_usage(self.directory).free
        if missing > 0:
            raise InputError(
                f"{self.directory}: {missing / 2**30:.2f} GiB more disk space is needed"
            )

    def add(self, name: str, record: Any) -> None:
        """Note that file `name` is written in full; a later start gets `record` back.

        The file is brought to disk, and then into the journal, while the next file is made.
        """
        self.finished[name] = record
        self._wait()
        self._pending = self._keeper.submit(self._keep, name, record)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _keep(self, name: str, record: Any) -> None:
        path = self.directory / name
        sync(path)
        self._append({"file": name, "size": path.stat().st_size, "record": record})

    def complete(self) -> None:
        """Make everything durable and give the directory its name."""
        self._wait()
        sync_tree(self.directory)
        self.directory.rename(self._final)
        sync(self._final.parent)
        (self._final / JOURNAL).unlink()  # last of all, since its lock keeps others out

    def _read_journal(self, identity: Any) -> dict[str, Any]:
        """The records of files that are still as they were finished; other lines are removed."""
        lines = self._lines()
        if not lines or lines[0] != {"identity": identity}:
            self._clear()
            lines = [{"identity": identity}]
        standing = [line for line in lines[1:] if self._stands(line)]
        self._journal.truncate(0)
        for line in (lines[0], *standing):
            self._append(line)
        return {line["file"]: line["record"] for line in standing}

    def _lines(self) -> list[Any]:
        self._journal.seek(0)
        lines = []
        with contextlib.suppress(ValueError):  # the last line may be cut off in the middle
            for line in self._journal:
                lines.append(json.loads(line))
        return lines

    def _stands(self, line: dict[str, Any]) -> bool:
        path = self.directory / line["file"]
        return path.is_file() and bool(path.stat().st_size == line["size"])

    def _clear(self) -> None:
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != JOURNAL:
                path.unlink()

    def _append(self, line: Any) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def describe_files(paths: list[Path]) -> list[tuple[str, int, int]]:
    """(name, size, time of change) of each file, by which a changed source is recognised."""
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths)]
