"""The list of a checkpoint's files, written last: what makes a directory a checkpoint.

MANIFEST.json of iteration_000120/:
{"format": 3, "iteration": 120, "world_size": 2, "files": {"state.json": [812, "9f86..."], ...},
"checksum": "60303a..."}

A file is listed with its size in bytes and its SHA-256; the checksum is the SHA-256 of all the rest
of the manifest, so that a changed or shortened list is noticed as a changed file is.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_rl.checkpoint.names import MANIFEST, STATE, iteration_of
from megatron_rl.weights.disk import sync

Kind = TypeVar("Kind")

FORMAT = 3
WITHOUT_CHECKSUM = 2
"""The format before: no checksum and no world_size."""


class ManifestError(ValueError):
    """Why a directory is no checkpoint that may be loaded."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What the manifest says of one file."""

    size: int
    digest: str


def write_manifest(
    directory: Path, iteration: int, world_size: int, files: Mapping[str, tuple[int, str]]
) -> None:
    """Write the manifest, and make sure that it and the directory are on the disk."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "iteration": iteration,
        "world_size": world_size,
        "files": dict(sorted(files.items())),
    }
    with (directory / MANIFEST).open("w") as file:
        json.dump({**content, "checksum": _checksum(content)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    sync(directory)


def read_manifest(directory: Path) -> dict[str, Listed]:
    """The files of a checkpoint by name; no other file is opened.

    Raises:
        ManifestError: there is none, it is damaged, it does not belong to this directory, or it
            lists too little for a checkpoint.
    """
    try:
        content = json.loads((directory / MANIFEST).read_text())
        files = {
            name: Listed(_checked(int, size), _checked(str, digest))
            for name, (size, digest) in content["files"].items()
        }
        found = content["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"no readable {MANIFEST}") from error
    if found not in (FORMAT, WITHOUT_CHECKSUM):
        raise ManifestError(f"format {found} is not {FORMAT}")
    if found == FORMAT and content.pop("checksum", None) != _checksum(content):
        raise ManifestError(f"{MANIFEST} was changed after it was written")
    if content.get("iteration") != iteration_of(directory):
        raise ManifestError(
            f"{MANIFEST} is of iteration {content.get('iteration')}, which the directory's name "
            "denies"
        )
    ranks = range(content.get("world_size", 1))
    missing = {STATE, "policy/.metadata", *(f"rank_{rank}.pt" for rank in ranks)} - files.keys()
    if missing:
        raise ManifestError(f"{MANIFEST} does not list {min(missing)}")
    return files


def looks_complete(directory: Path) -> bool:
    """True where the manifest is in order and every file has its size; contents are not read."""
    try:
        files = read_manifest(directory)
        return all((directory / name).stat().st_size == files[name].size for name in files)
    except (ManifestError, OSError):
        return False


def fault_of(directory: Path, share: slice) -> str | None:
    """Why the checkpoint must not be loaded; of the files, sorted by name, only a share is read."""
    try:
        files = read_manifest(directory)
    except ManifestError as error:
        return str(error)
    for name in sorted(files)[share]:
        listed, file = files[name], directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != listed.size:
            return f"{name} has {file.stat().st_size} bytes instead of {listed.size}"
        if digest_of(file) != listed.digest:
            return f"{name} was changed after it was written"
    return None


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(kind: type[Kind], value: object) -> Kind:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
