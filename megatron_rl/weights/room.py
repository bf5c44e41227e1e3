"""Room on the disk: looked for before much is written, and called by its name where it ends."""

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import RunError
from megatron_rl.files import gone

ROOM_FOR_THE_REST = 1 << 20
"""Bytes for what stands beside the tensors: states, indices, the manifest."""


@dataclass(frozen=True)
class Room:
    """What is written into a directory, which may not be there yet."""

    what: str  # for messages: "the checkpoint"
    directory: Path
    needed: int = ROOM_FOR_THE_REST  # bytes in all

    def look(self) -> None:
        """Check that it fits.

        Raises:
            RunError: it does not.
        """
        if self._free < self.needed:
            raise self._full()

    def naming_full_disk(self, work: Callable[[], None]) -> None:
        """Do work that writes; a full disk gets its name, which torch's own writer hides.

        Raises:
            RunError: the disk is full, or the directory is gone.
        """
        try:
            work()
        except RunError:
            raise
        except (OSError, RuntimeError) as error:
            if isinstance(error, FileNotFoundError | RuntimeError) and not self.directory.exists():
                raise gone(self.directory, self.what) from error
            is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if is_full or self._free < ROOM_FOR_THE_REST:
                raise self._full() from error
            raise

    @property
    def _free(self) -> int:
        there = next(path for path in (self.directory, *self.directory.parents) if path.exists())
        return shutil.disk_usage(there).free

    def _full(self) -> RunError:
        needed, free = self.needed / 2**20, self._free / 2**20
        return RunError(
            f"{self.directory}: no space left on device: {self.what} needs {needed:,.1f} MiB, "
            f"{free:,.1f} MiB are free. Checkpoints from before are as they were. Free some room, "
            "of the oldest one for example, and start the same command again, or "
            "set checkpoint.keep_last=1 and checkpoint.export_hf=false, which need less of it"
        )
