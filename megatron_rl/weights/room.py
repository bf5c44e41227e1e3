"""Room on the disk for a checkpoint: looked for before a save, and called by its name after one."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_rl.errors import RunError

ROOM_FOR_THE_REST = 1 << 20
"""Bytes for what stands beside the tensors: states, indices, the manifest."""


def check_room(directory: Path, needed: int) -> None:
    """Check that so many bytes fit.

    Raises:
        RunError: they do not.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise _full(directory, needed, free)


def naming_full_disk(work: Callable[[], None], directory: Path, needed: int) -> None:
    """Do work that writes there; a full disk gets its name, which torch's own writer hides.

    Raises:
        RunError: the disk is full.
    """
    try:
        work()
    except RunError:
        raise
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(directory).free
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or free < ROOM_FOR_THE_REST:
            raise _full(directory, needed, free) from error
        raise


def _full(directory: Path, needed: int, free: int) -> RunError:
    return RunError(
        f"{directory}: no space left on device: the checkpoint needs {needed / 2**20:,.1f} MiB, "
        f"{free / 2**20:,.1f} MiB are free. Checkpoints from before are as they were. Free some "
        "room, of the oldest one for example, and start the same command again; "
        "checkpoint.keep_last=1 and checkpoint.export_hf=false need less of it"
    )
