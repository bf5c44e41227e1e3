"""Sources of rows: files in several formats, directories of them, and hub data sets."""

import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.errors import InputError
from megatron_rl.files import refuse_irregular
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.folder import files_in
from megatron_rl.prompts.formats import Record, format_of, read_records, stem_of
from megatron_rl.prompts.layouts import (
    MISSING,
    PROMPTS,
    RESPONSE,
    Layout,
    RowReader,
    find,
    look_ahead,
    no_layout,
    recognise,
)
from megatron_rl.prompts.rows import LeftOut, LeftOutError, Problems, Row, RowError, column_list

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
HUB_TIMEOUT_S = 10.0
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(slots=True)
class RowsRead:
    """The rows of all files, and what is to be said of them."""

    rows: list[Row] = field(default_factory=list)
    num_read: int = 0
    layouts: dict[str, list[str]] = field(default_factory=dict)  # a layout's line -> its files
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)  # by reason
    unusable: Problems = field(default_factory=lambda: Problems("prompts.path"))


def read_rows(config: PromptsConfig, with_gold: bool, *, is_benchmark: bool = False) -> RowsRead:
    """All rows in the order of config.path.

    Args:
        with_gold: read responses to imitate too; rows need no answer then.
        is_benchmark: a row that cannot be used, or has no answer, is an error: with fewer questions
            it would be another benchmark.

    Raises:
        InputError: more rows are unusable than config.max_unusable_frac, a column is missing.
    """
    read = RowsRead()
    for path in config.paths:
        for opened in open_data(path, config.split):
            _read_set(opened, config, with_gold, is_benchmark, read)
    return read


def _read_set(
    opened: "OpenedData", config: PromptsConfig, with_gold: bool, is_benchmark: bool, read: RowsRead
) -> None:
    first, records = look_ahead(opened.records)
    reader = _reader(opened, config, first, with_gold)
    if opened.note:
        read.notes.append(opened.note)
    layout = reader.layout
    read.layouts.setdefault(f"{layout.name} ({layout.columns})", []).append(opened.where)
    problems, num_read = Problems(opened.where), 0
    for line, fields in records:
        num_read += 1
        try:
            read.rows.append(reader.read(line, fields))
        except RowError as error:
            problems.add(f"line {line}", str(error))
            read.unusable.add(f"{opened.name}:{line}", str(error))
        except LeftOutError as left:
            where = f"{opened.name}:{line}"
            read.left_out.setdefault(left.reason, LeftOut()).add(where, left.detail)
            if is_benchmark:
                problems.add(f"line {line}", ": ".join(filter(None, [left.reason, left.detail])))
    read.num_read += num_read
    if num_read == 0:
        raise InputError(f"{opened.where}: the data set has no rows")
    if is_benchmark:
        problems.raise_if_any("Mend these rows; with fewer it would be another benchmark")
    problems.raise_if_more(config.max_unusable_frac, num_read)


def _reader(
    opened: "OpenedData", config: PromptsConfig, first: Sequence[object], with_gold: bool
) -> RowReader:
    """The reader of a set by its first records."""
    prompt, answer = config.prompt_key, config.answer_key
    layout = recognise(first, prompt, answer, needs_answer=not with_gold)
    if layout is None:
        _check_named(opened.where, first, config)
        if _is_broken(first):
            layout = PROMPTS  # every row will say what is wrong with it
        else:
            raise no_layout(
                opened.where,
                first,
                "Name the columns with prompts.prompt_key and prompts.answer_key",
            )
    response = None
    if with_gold:
        response = config.response_key or RESPONSE
        _check_response(opened.where, first, layout, config)
    return RowReader(
        layout=layout, source=opened.name, response=response, needs_answer=not with_gold
    )


def _is_broken(first: Sequence[object]) -> bool:
    return not any(isinstance(record, Mapping) for record in first)


def _check_named(where: str, first: Sequence[object], config: PromptsConfig) -> None:
    """Refuse a wrong column name on the first rows, since else every row would be a fault."""
    record = next((record for record in first if isinstance(record, Mapping)), None)
    named = {"prompt_key": config.prompt_key, "answer_key": config.answer_key}
    _refuse_absent(where, record, {key: name for key, name in named.items() if name is not None})


def _check_response(
    where: str, first: Sequence[object], layout: Layout, config: PromptsConfig
) -> None:
    """Refuse a set without responses to imitate: neither a column, nor the turn of a chat."""
    record = next((record for record in first if isinstance(record, Mapping)), None)
    is_chat = isinstance(find(record, layout.prompt), list)
    if config.response_key is None and is_chat:
        return
    _refuse_absent(where, record, {"response_key": config.response_key or RESPONSE})


def _refuse_absent(
    where: str, record: Mapping[str, object] | None, columns: Mapping[str, str]
) -> None:
    wrong = {key: name for key, name in columns.items() if find(record, name) is MISSING}
    if wrong and record is not None:
        named = ", ".join(f"prompts.{key}={name!r}" for key, name in wrong.items())
        raise InputError(
            f"{where}: {named}: no such column in the first row, which has {column_list(record)}. "
            "Name the column to read; a.b is b within a"
        )


@dataclass(frozen=True, slots=True)
class OpenedData:
    """An open file or hub data set with its records."""

    name: str
    where: str
    records: Iterator[Record]
    num_records: int | None = None  # None: not known before all are read
    revision: str | None = None  # commit of a hub data set, where the hub tells it
    note: str | None = None  # on files of a directory that are not read


def open_data(path: str, split: str, setting: str = "prompts.path") -> Iterator[OpenedData]:
    """Each file behind a path, or the hub data set; messages say that `setting` named it."""
    location = Path(path).expanduser()
    split_setting = setting.rpartition(".")[0] + ".split" if "." in setting else "--split"
    if not location.exists():
        if HUB_NAME.fullmatch(path) and format_of(location) is None:
            yield _open_hub(path, split, setting, split_setting)
            return
        raise InputError(
            f"{setting}={path!r}: there is no such file or directory. "
            "Check the name; relative names start at the working directory"
        )
    files, note = files_in(location, split, setting)
    for file in files:
        refuse_irregular(file)
    for file in files:
        yield OpenedData(stem_of(file), str(file), read_records(file), note=note)
        note = None


def _open_hub(path: str, split: str, setting: str, split_setting: str) -> OpenedData:
    import datasets  # type: ignore[import-untyped]  # the package ships no types

    name, _, subset = path.partition(":")
    try:
        _check_hub(name)
        rows = datasets.load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{setting}={path!r}: no such file here, and the hub gives no data set of that name "
            f"with {split_setting}={split!r} ({type(error).__name__}: {error}). Check the name, or "
            "download the data and name the file; cached data are read with HF_HUB_OFFLINE=1"
        ) from error
    return OpenedData(path, f"{path} (hub)", enumerate(rows, start=1), len(rows), _revision(rows))


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
