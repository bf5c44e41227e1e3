"""Durable files: written through to the disk, and put in place by one rename."""

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file or a directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until everything in a directory is on disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)


def put_in_place(made: Path, final: Path) -> None:
    """Give a complete directory its final name; a directory that has the name is removed."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    made.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
