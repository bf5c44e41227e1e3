"""What the command-line tools of this room share: progress, messages, exit codes."""

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_rl.errors import ConfigErrors, InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
FAILED = 2
STOPPED = 130  # as a shell says it


@dataclass(frozen=True)
class Bar:
    """A progress bar in bytes."""

    progress: Progress
    task: TaskID

    def begin(self, total_bytes: int) -> None:
        self.progress.reset(self.task, total=total_bytes)

    def advance(self, nbytes: int) -> None:
        self.progress.advance(self.task, nbytes)


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A bar on stderr, so that stdout has the result alone."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, progress.add_task(title, total=None))


def run_command(work: Callable[[], int]) -> int:
    """The exit code of a tool; what a user can mend is one line on stderr."""
    try:
        return work()
    except (InputError, ConfigErrors) as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        return STOPPED
    except Exception as error:
        if not (isinstance(error, OSError) and error.errno in DENIED):
            traceback.print_exc()  # a fault of ours, and no result either
        sys.stderr.write(f"error: {error}\n")
        return FAILED
