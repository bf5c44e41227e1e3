"""The files that a path stands for: itself, or those of a directory that are of one split."""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.prompts.formats import PLAIN, SUFFIXES, format_of

# "validation-00000-of-00001.parquet", "gsm8k_test.jsonl"
_SPLIT = re.compile(
    r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval|heldout)(?:$|[-_.\d])", re.IGNORECASE
)
_SAME = dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
# What lies beside data: a manifest of ours, notes of the hub's and of other tools.
_BESIDE = re.compile(r"\..*|.*\.manifest\.json|dataset_infos?\.json|state\.json")


def files_in(location: Path, split: str, split_setting: str) -> tuple[list[Path], str | None]:
    """The files to read, and a note on those that are left out.

    Of a directory these are the files whose names do not say another split, in the order of names.

    Raises:
        InputError: no file has a known ending; none is of the split.
    """
    if not location.is_dir():
        if format_of(location) is None:
            raise InputError(
                f"{location}: the ending {location.suffix!r} is not one of {', '.join(SUFFIXES)}. "
                "Convert the file, one JSON object per line, and name it .jsonl"
            )
        return [location], None
    files = _data_files(location)
    if not files and (location / "data").is_dir():  # as in a clone of a hub data set
        files = _data_files(location / "data")
    if not files:
        raise InputError(
            f"{location}: the directory holds no {', '.join(PLAIN[:-1])} or {PLAIN[-1]} file"
            + _below(location)
        )
    wanted = _canonical(split)
    read = [file for file in files if split_of(file) in (None, wanted)]
    others = [file for file in files if file not in read]
    if not read:
        there = ", ".join(sorted({str(split_of(file)) for file in files}))
        raise InputError(
            f"{location}: no file is of the split {split!r}; the names there say {there}. "
            f"Set {split_setting}={split_of(files[0])}, or name the file itself"
        )
    if not others:
        return read, None
    names = _names(others)
    return read, f"{location}: {_names(read)} read; {names} left out, of another split than {split}"


def split_of(file: Path) -> str | None:
    """The split that a file's name says: "train", "test", "validation", or None."""
    found = _SPLIT.search(file.name.split(".")[0])
    return None if found is None else _canonical(found[1])


def _canonical(split: str) -> str:
    return _SAME.get(split.lower(), split.lower())


def _data_files(directory: Path) -> list[Path]:
    files = sorted(
        file
        for file in directory.iterdir()
        if format_of(file) is not None and not _BESIDE.fullmatch(file.name)
    )
    # A .json file beside others is more likely a description than data.
    others = [file for file in files if format_of(file) != ".json"]
    return others or files


def _below(location: Path) -> str:
    folders = sorted(
        entry.name for entry in location.iterdir() if entry.is_dir() and _data_files(entry)
    )
    return f". Name one of the directories below it: {', '.join(folders)}" if folders else ""


def _names(files: Sequence[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
