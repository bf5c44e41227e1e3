"""The formats of files with rows: JSON Lines, JSON, CSV, parquet, also packed by gzip."""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from megatron_rl.errors import InputError
from megatron_rl.files import MAX_TEXT_BYTES, JsonError, open_regular, parse_json
from megatron_rl.prompts.rows import RowError

Record = tuple[int, object]  # line, from 1; its columns, or a RowError where it has none

MAX_LINE_BYTES = 64 << 20  # a packed file of a few kilobytes may hold a line that never ends
_GZIP = ".gz"


def format_of(file: Path) -> str | None:
    """The ending that says how the file is read, without .gz; None: none that is known."""
    name = file.with_suffix("") if file.suffix == _GZIP else file
    known = PLAIN if file.suffix != _GZIP else PACKED
    return name.suffix if name.suffix in known else None


def stem_of(file: Path) -> str:
    """The file's name without its endings."""
    return file.with_suffix("").stem if file.suffix == _GZIP else file.stem


def read_records(file: Path) -> Iterator[Record]:
    """Every record of a file in one of the formats.

    Raises:
        InputError: the file cannot be read. A record that cannot be is a RowError in its place.
    """
    kind = format_of(file)
    assert kind is not None
    try:
        yield from _READERS[kind](file)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: cannot be read ({reason}). Copy the file again") from error


def _read_json_lines(file: Path) -> Iterator[Record]:
    """The record of every line that is not blank."""
    with _opened(file) as lines:
        yield from _json_lines(file, lines)


def _json_lines(file: Path, lines: BinaryIO) -> Iterator[Record]:
    line = 0
    while raw := lines.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            raise InputError(
                f"{file}: line {line} has more than {MAX_LINE_BYTES} bytes. Write one JSON object "
                "per line"
            )
        if raw.strip():
            yield line, _parsed(raw)


def _parsed(raw: bytes) -> object:
    try:
        return parse_json(raw.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start + 1} of the line")
    except JsonError as error:
        return RowError(str(error))


def _read_json(file: Path) -> Iterator[Record]:
    """The items of one list, or, as many such files are, JSON Lines."""
    with _opened(file) as opened:
        start = opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        opened.seek(0)
        if not start.startswith(b"["):
            yield from _json_lines(file, opened)
            return
        raw = opened.read(MAX_TEXT_BYTES + 1)
    if len(raw) > MAX_TEXT_BYTES:
        raise InputError(
            f"{file}: has more than {MAX_TEXT_BYTES} bytes, which are read as a whole. Write one "
            "JSON object per line, and name it .jsonl"
        )
    try:
        records = parse_json(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start + 1}. Copy it again") from error
    except JsonError as error:
        raise InputError(f"{file}: {error}. Copy the file again") from error
    yield from enumerate(cast("list[object]", records), start=1)


def _read_csv(file: Path) -> Iterator[Record]:
    """The rows below the first one, which names the columns; all values are text."""
    csv.field_size_limit(min(sys.maxsize, MAX_LINE_BYTES))
    with _opened(file) as opened, io.TextIOWrapper(opened, "utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, strict=True)
        try:
            for row in rows:
                extra = row.pop(None, None)
                is_whole = extra is None and None not in row.values()
                yield (
                    rows.line_num,
                    row if is_whole else RowError(f"has not {len(rows.fieldnames or ())} columns"),
                )
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 after line {rows.line_num}") from error
        except csv.Error as error:
            raise InputError(f"{file}: not CSV after line {rows.line_num}: {error}") from error


def _read_parquet(file: Path) -> Iterator[Record]:
    import datasets  # type: ignore[import-untyped]  # the package ships no types
    import pyarrow.parquet  # type: ignore[import-untyped]

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we tell its errors ourselves
    try:
        if pyarrow.parquet.read_metadata(file).num_rows == 0:
            return  # datasets would ask for batches of 0 rows
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from enumerate(rows, start=1)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}: is not a readable parquet file ({error}). Write or download it again"
        ) from error


def _opened(file: Path) -> BinaryIO:
    raw = io.BufferedReader(open_regular(file))
    return cast("BinaryIO", gzip.GzipFile(fileobj=raw) if file.suffix == _GZIP else raw)


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".csv": _read_csv,
}
PLAIN = tuple(_READERS)
PACKED = (".jsonl", ".json", ".csv")
"""The endings that may have .gz behind them; parquet packs its columns itself."""
SUFFIXES = (*PLAIN, *(f"{ending}{_GZIP}" for ending in PACKED))
