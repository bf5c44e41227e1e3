"""Sources of rows: JSON Lines and parquet files, directories of them, and hub data sets."""

import io
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import InputError
from megatron_rl.files import JsonError, open_regular, parse_json, refuse_irregular
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.rows import Columns, Problems, Row, RowError, column_list, to_row

SUFFIXES = (".jsonl", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
HUB_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


def read_rows(config: PromptsConfig, with_gold: bool) -> list[Row]:
    """All rows in the order of config.path; InputError with every problem of the first bad file."""
    columns = Columns(
        prompt=config.prompt_key,
        answer=config.answer_key,
        response=config.response_key if with_gold else None,
    )
    rows: list[Row] = []
    for path in config.paths:
        for opened in open_data(path, config.split):
            rows.extend(_checked(opened.records, columns, opened.name, opened.where))
    return rows


Record = tuple[int, object]  # line, from 1; its columns, or a RowError where it has none


@dataclass(frozen=True, slots=True)
class OpenedData:
    """An open file or hub data set with its records."""

    name: str
    where: str
    records: Iterator[Record]
    num_records: int | None = None  # None: not known before all are read
    revision: str | None = None  # commit of a hub data set, where the hub tells it


def open_data(path: str, split: str, setting: str = "prompts.path") -> Iterator[OpenedData]:
    """Each file behind a path, or the hub data set; messages say that `setting` named it."""
    location = Path(path).expanduser()
    if not location.exists():
        if HUB_NAME.fullmatch(path) and location.suffix not in SUFFIXES:
            yield _open_hub(path, split, setting)
            return
        raise InputError(
            f"{setting}={path!r}: there is no such file or directory. "
            "Check the name; relative names start at the working directory"
        )
    for file in _files(location):
        refuse_irregular(file)
        read = read_json_lines if file.suffix == ".jsonl" else _read_parquet
        yield OpenedData(file.stem, str(file), read(file))


def _files(location: Path) -> list[Path]:
    if location.is_dir():
        files = sorted(file for file in location.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise InputError(f"{location}: the directory holds no {' or '.join(SUFFIXES)} file")
        return files
    if location.suffix not in SUFFIXES:
        raise InputError(
            f"{location}: the ending {location.suffix!r} is not one of {', '.join(SUFFIXES)}. "
            "Convert the file, one JSON object per line, and name it .jsonl"
        )
    return [location]


def _checked(records: Iterator[Record], columns: Columns, name: str, where: str) -> Iterator[Row]:
    problems = Problems(where)
    num_records = 0
    for num_records, (line, fields) in enumerate(records, start=1):
        try:
            if isinstance(fields, RowError):
                raise fields
            if num_records == 1:
                _check_columns(fields, columns, where)
            yield to_row(fields, columns, name, line)
        except RowError as error:
            problems.add(f"line {line}", str(error))
    problems.raise_if_any("Mend or remove these rows")
    if num_records == 0:
        raise InputError(f"{where}: the data set has no rows")


def _check_columns(first: object, columns: Columns, where: str) -> None:
    """Refuse a wrong column name on the first row, since else every row would be a fault."""
    if not isinstance(first, Mapping):
        return
    keys = dict(zip(("prompt_key", "answer_key", "response_key"), columns.names, strict=False))
    wrong = {key: column for key, column in keys.items() if column not in first}
    if wrong:
        named = ", ".join(f"prompts.{key}={column!r}" for key, column in wrong.items())
        raise InputError(
            f"{where}: {named}: no such column in the first row, which has {column_list(first)}. "
            "Name the column to read"
        )


def read_json_lines(file: Path) -> Iterator[Record]:
    """The record of every line that is not blank."""
    try:
        with io.BufferedReader(open_regular(file)) as lines:
            for line, raw in enumerate(lines, start=1):
                if raw.strip():
                    yield line, _parsed(raw)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error


def _parsed(raw: bytes) -> object:
    try:
        return parse_json(raw.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start + 1} of the line")
    except JsonError as error:
        return RowError(str(error))


def _read_parquet(file: Path) -> Iterator[Record]:
    import datasets  # type: ignore[import-untyped]  # the package ships no types
    import pyarrow.parquet  # type: ignore[import-untyped]

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we tell its errors ourselves
    try:
        if pyarrow.parquet.read_metadata(file).num_rows == 0:
            return  # datasets would ask for batches of 0 rows
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from _numbered(rows)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}: is not a readable parquet file ({error}). Write or download it again"
        ) from error


def _numbered(rows: Iterable[object]) -> Iterator[Record]:
    return enumerate(rows, start=1)


def _open_hub(path: str, split: str, setting: str) -> OpenedData:
    import datasets

    name, _, subset = path.partition(":")
    try:
        _check_hub(name)
        rows = datasets.load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        split_setting = setting.rpartition(".")[0] + ".split" if "." in setting else "--split"
        raise InputError(
            f"{setting}={path!r}: no such file here, and the hub gives no data set of that name "
            f"with {split_setting}={split!r} ({type(error).__name__}: {error}). Check the name, or "
            "download the data and name the file; cached data are read with HF_HUB_OFFLINE=1"
        ) from error
    return OpenedData(path, f"{path} (hub)", _numbered(rows), len(rows), _revision(rows))


def _revision(rows: Any) -> str | None:
    """The commit in the addresses of the files that a hub data set was made of."""
    files = rows.info.download_checksums or {}
    found = (_COMMIT.search(str(address)) for address in files)
    return next((match[1] for match in found if match), None)


def _check_hub(name: str) -> None:
    """Fail within seconds where the hub is out of reach: loading would retry for half a minute."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    url = f"{huggingface_hub.constants.ENDPOINT}/api/datasets/{name}"
    try:
        urllib.request.urlopen(url, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # the hub answers; an error about the name comes from loading, with more words
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # certificates are the client's business
            raise
