"""The files that a path stands for: itself, or those of a directory that are of one split."""

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.prompts.formats import PLAIN, SUFFIXES, format_of

SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "tests": "test",
    "validation": "validation",
    "validate": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "development": "validation",
    "eval": "eval",
    "evaluation": "eval",
    "heldout": "heldout",
    "holdout": "heldout",
    "unseen": "heldout",
}
"""A word in the name of a file -> the split that it says."""

# "trainData", "GSM8K_test.v2", "held-out": words end at separators, digits and capitals.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")
_OF_DATA = re.compile(r"(?:data|dataset|set|split|file|samples?|rows|questions|problems)$")
_SHARD = re.compile(r"[-_.](?:shard|part|chunk)?[-_.]?\d+(?:[-_.]?of[-_.]?\d+)?$", re.IGNORECASE)

# What lies beside data: a manifest of ours, notes of the hub's and of other tools, documents.
_BESIDE = re.compile(
    r"\..*|.*\.manifest\.json|dataset_infos?\.json|state\.json|.*\.(?:md|rst|py|ya?ml|sh|pdf|png)"
    r"|(?:readme|license|licence|citation|checksums?|sha256sums?)(?:\..*)?",
    re.IGNORECASE,
)
_MOST_LOOKED_AT = 1000  # entries below a folder


def files_in(location: Path, split: str, setting: str) -> tuple[list[Path], str | None]:
    """The files to read, and a note on those that are left out.

    Of a directory these are the files whose names say the split, in the order of names; where no
    name says it, those whose names say none.

    Args:
        setting: that named the location, for messages; what ends in .path has a .split beside it.

    Raises:
        InputError: no file has a known ending; none is of the split; files of the split lie beside
            others of which nothing says what they are.
    """
    if not location.is_dir():
        if format_of(location) is None:
            raise InputError(
                f"{location}: the ending {location.suffix!r} is not one of {', '.join(SUFFIXES)}. "
                "Convert the file, one JSON object per line, and name it .jsonl"
            )
        return [location], None
    split_setting = setting.rpartition(".")[0] + ".split" if "." in setting else "--split"
    passed_over = _passed_over(location)
    files = _data_files(location)
    if not files and (location / "data").is_dir():  # as in a clone of a hub data set
        files = _data_files(location / "data")
        passed_over = [name for name in passed_over if name != "data/"]
        passed_over += [f"data/{name}" for name in _passed_over(location / "data")]
    if not files:
        raise InputError(
            f"{location}: the directory holds no {', '.join(PLAIN[:-1])} or {PLAIN[-1]} file"
            + _below(location)
        )
    read = _of_split(files, location, split, setting, split_setting)
    _refuse_twins(read, location)
    others = [file.name for file in files if file not in read]
    told = []
    if others:
        told.append(f"{_names(others)} left out, of another split than {split}")
    if passed_over:
        told.append(f"{_names(passed_over)} passed over, which are no such files")
    if not told:
        return read, None
    return read, "; ".join([f"{location}: {_names([file.name for file in read])} read", *told])


def split_of(file: Path) -> str | None:
    """The split that a file's name says: "train", "test", "validation", ...; None: it says none.

    Of two words the one at the end counts, then the one at the start.
    """
    words = _WORD.findall(_SHARD.sub("", _stem(file)))
    said = [_said(word, after) for word, after in zip(words, [*words[1:], ""], strict=True)]
    found = [split for split in said if split is not None]
    ends = next((split for split in (*reversed(said[-2:]), *said[:1]) if split is not None), None)
    return ends if ends is not None else next(iter(found), None)


def _said(word: str, after: str) -> str | None:
    word = word.lower()
    if word in ("held", "hold") and after.lower() == "out":
        return "heldout"
    return SPLITS.get(word) or SPLITS.get(_OF_DATA.sub("", word))


def _canonical(split: str) -> str:
    return split_of(Path(split)) or split.lower()


def _of_split(
    files: Sequence[Path], location: Path, split: str, setting: str, split_setting: str
) -> list[Path]:
    """The files of the split, or those whose names say none where no name says it."""
    wanted = _canonical(split)
    says = {file: split_of(file) for file in files}
    named = [file for file in files if says[file] == wanted]
    silent = [file for file in files if says[file] is None]
    if named and silent:
        way_out = "name one of the files"
        if setting == "prompts.path":
            way_out = f"set prompts.path=[{','.join(map(str, named))}]"
        raise InputError(
            f"{location}: the names of {_names([file.name for file in named])} say the split "
            f"{split!r}, and those of {_names([file.name for file in silent])} say none, so "
            f"nothing tells whether they belong together. Move the others elsewhere, or {way_out}"
        )
    if not named and not silent:
        there = ", ".join(sorted({str(found) for found in says.values()}))
        raise InputError(
            f"{location}: no file is of the split {split!r}; the names there say {there}. "
            f"Set {split_setting}={says[files[0]]}, or name the file itself"
        )
    return named or silent


def _refuse_twins(files: Sequence[Path], location: Path) -> None:
    """Refuse a set that lies there in two formats: each of its rows would be there twice."""
    by_stem = dict[str, Path]()
    for file in files:
        first = by_stem.setdefault(_stem(file), file)
        if first is not file:
            raise InputError(
                f"{location}: {first.name} and {file.name} have one name, so they may be one set "
                "in two formats. Name the file to read, or rename one of them"
            )


def _data_files(directory: Path) -> list[Path]:
    files = sorted(
        file
        for file in directory.iterdir()
        if format_of(file) is not None and not _BESIDE.fullmatch(file.name)
    )
    # A .json file beside others is more likely a description than data, unless it says a split.
    others = [file for file in files if format_of(file) != ".json" or split_of(file) is not None]
    return others or files


def _passed_over(directory: Path) -> list[str]:
    """Names of what may be data and is not read: other endings, and folders with data in them."""
    read = set(_data_files(directory))
    names = []
    for entry in sorted(directory.iterdir()):
        if entry in read or _BESIDE.fullmatch(entry.name):
            continue
        if not entry.is_dir():
            names.append(entry.name)
        elif any(format_of(file) for file in islice(entry.rglob("*"), _MOST_LOOKED_AT)):
            names.append(f"{entry.name}/")
    return names


def _below(location: Path) -> str:
    folders = sorted(
        entry.name for entry in location.iterdir() if entry.is_dir() and _data_files(entry)
    )
    return f". Name one of the directories below it: {', '.join(folders)}" if folders else ""


def _stem(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    return next((name.removesuffix(end) for end in PLAIN if name.endswith(end)), name)


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
