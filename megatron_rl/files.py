"""Files that somebody else wrote: regular ones of a sane size, and JSON that says one thing."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from megatron_rl.errors import InputError, RunError

MAX_TEXT_BYTES = 256 << 20  # of a file that is read as a whole; the largest tokenizers have 35 MiB
MAX_SHOWN_CHARS = 60

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class JsonError(ValueError):
    """The reason why a text is no JSON that can be used."""


def open_regular(path: Path) -> FileIO:
    """The file, open for reading without a buffer; opening never waits.

    Raises:
        InputError: it is no regular file: a FIFO would wait for a writer, a device has no end.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(_irregular(path, mode))
    return FileIO(descriptor)


def gone(directory: Path, what: str) -> RunError:
    """The error of a run whose directory is not there any more. what: it wrote then."""
    return RunError(
        f"{directory}: it is gone: somebody removed or renamed it, or one above it, while this run "
        f"wrote {what}. Bring it back where there is a copy, and start the same command again"
    )


@contextmanager
def noticing_a_loss(directory: Path, what: str) -> Iterator[None]:
    """A context in which `what` is written there; where the directory is gone, that is the error.

    Raises:
        RunError: it is.
    """
    try:
        yield
    except FileNotFoundError as error:
        if directory.exists():
            raise
        raise gone(directory, what) from error


def refuse_irregular(path: Path) -> None:
    """Raise InputError where something is there that is no regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # who opens it tells why it cannot be
    if not stat.S_ISREG(mode):
        raise InputError(_irregular(path, mode))


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a regular file.

    Raises:
        InputError: it is no regular file, or has more than MAX_TEXT_BYTES.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_TEXT_BYTES:
            raise InputError(
                f"{path}: has {size} bytes: at most {MAX_TEXT_BYTES} are read of such a file. "
                "Is it another file under this name?"
            )
        return file.read().decode(encoding)


def parse_json(text: str) -> object:
    """The value of a JSON text in which no object has a key twice.

    Raises:
        JsonError: it is none: of two values of one key, programs take different ones.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise JsonError(f"not JSON: {error.msg} at {line}column {error.colno}") from error
    except JsonError:
        raise
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 10,000 brackets
        raise JsonError(f"not JSON that can be read: {type(error).__name__}") from error


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object that a file holds; InputError where it holds none."""
    try:
        value = parse_json(read_text(path))
    except JsonError as error:
        raise InputError(f"{path}: {error}. Copy the file again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}. Copy the file again") from error
    if not isinstance(value, dict):
        shown = ascii(value)[:MAX_SHOWN_CHARS]
        raise InputError(f"{path}: {shown} is not a JSON object. Copy the file again")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise JsonError(f"the key {ascii(twice)[:MAX_SHOWN_CHARS]} stands twice in one object")
    return found


def _irregular(path: Path, mode: int) -> str:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "of an unknown kind")
    return f"{path}: is {kind}: must be a regular file. Copy what it gives into one"
