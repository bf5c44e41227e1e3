"""Prompt files out of published problems: what is read, what is left out and why."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_rl.commands.published import (
    Chosen,
    Published,
    choose_columns,
    find_published,
    why_invalid,
)
from megatron_rl.errors import InputError
from megatron_rl.prompts.rows import Columns, Row, RowError, json_line, to_row
from megatron_rl.prompts.source import SUFFIXES, OpenedData, open_data
from megatron_rl.prompts.token_table import ENCODE_CHUNK
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.reward.gold import check_gold, with_percent_sign

UNREADABLE = "row that cannot be read"
MARKED = "row that its set marks as invalid or as a proof"
NO_ANSWER = "no final answer"
BAD_ANSWER = "answer that no response could match"
OVERLONG = "prompt over the token limit"
CONTROL_TOKEN = "prompt that spells a control token"

MAX_EXAMPLES = 3
_COLUMNS = Columns(prompt="prompt", answer="answer", response=None)

Progress = Callable[[Iterable[Row | None], OpenedData], Iterable[Row | None]]
"""Shows how far the reading of one set is, and passes everything on."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """The sets to read, and the rules by which rows are left out."""

    datasets: tuple[str, ...]  # as find_published takes them
    split: str | None = None  # None: each set's own
    prompt_key: str | None = None  # None: by the set's columns
    answer_key: str | None = None
    is_math: bool = True  # check and complete answers as the reward `math` compares them
    tokenizer: Tokenizer | None = None  # None: prompts of any length are kept
    max_prompt_tokens: int = 700  # of the problem alone, without template, as the paper's code
    max_problems: int | None = None  # a random subset, in the order of the rows
    seed: int = 0


@dataclass(slots=True)
class Dropped:
    """Rows left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first few, with what is wrong


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The outcome of reading one set."""

    name: str
    where: str
    revision: str | None  # commit on the hub
    sha256: str | None  # of a local file
    num_read: int
    num_kept: int
    dropped: Mapping[str, Dropped]


def prepare(
    settings: Preparation, output: Path, progress: Progress = lambda rows, _: rows
) -> list[SourceReport]:
    """Write the prompt file and its manifest, as a whole or not at all.

    Raises:
        InputError: an unknown set, a missing column, an unreachable hub, nothing left.
    """
    if output.suffix not in SUFFIXES:
        raise InputError(f"--output {output}: must end in {' or '.join(SUFFIXES)}")
    rows: list[Row] = []
    reports: list[SourceReport] = []
    for opened, published in _open_all(settings):
        _refuse_output(opened, output)
        if opened.name in (report.name for report in reports):
            raise InputError(
                f"--dataset: two sets are called {opened.name!r}, so ids would not be unique. "
                "Rename one of the files"
            )
        dropped: dict[str, Dropped] = {}
        reader = _Reader(settings, published, opened, dropped)
        kept = [row for row in progress(reader.rows(), opened) if row is not None]
        kept = list(_fitting(kept, settings, dropped))
        reports.append(reader.report(len(kept)))
        rows += kept
    if not rows:
        raise InputError("\n".join(["--dataset: no row is left:", *_why_dropped(reports)]))
    _write(_subset(rows, settings), output, settings, reports)
    return reports


def _why_dropped(reports: Iterable[SourceReport]) -> Iterator[str]:
    for report in reports:
        for reason, dropped in sorted(report.dropped.items()):
            yield f"  {report.where}: {dropped.count} of {report.num_read}: {reason}"
            yield from (f"    {example}" for example in dropped.examples)


def _refuse_output(opened: OpenedData, output: Path) -> None:
    source = Path(opened.where)
    if output.exists() and source.exists() and output.samefile(source):
        raise InputError(
            f"--output {output}: it is one of the files to read, and rows that are left out would "
            "be lost. Name another file"
        )


def manifest_path(output: Path) -> Path:
    """The path of a prompt file's manifest."""
    return output.with_name(output.name + ".manifest.json")


def _open_all(settings: Preparation) -> Iterator[tuple[OpenedData, Published]]:
    for dataset in settings.datasets:
        name, published = find_published(dataset)
        if settings.prompt_key is not None:
            published = replace(published, prompt=(settings.prompt_key,))
        if settings.answer_key is not None:
            published = replace(published, answer=(settings.answer_key,), solution=())
        split = settings.split or published.split
        for opened in open_data(published.path, split, setting="--dataset"):
            is_named = name != published.path
            yield replace(opened, name=name) if is_named else opened, published


class _Reader:
    """Reads the rows of one set, and counts those that are left out."""

    def __init__(
        self,
        settings: Preparation,
        published: Published,
        opened: OpenedData,
        dropped: dict[str, Dropped],
    ) -> None:
        self._settings, self._published, self._opened = settings, published, opened
        self._dropped = dropped
        self._columns: Chosen | None = None  # known from the first row on
        self._num_read = 0

    def rows(self) -> Iterator[Row | None]:
        """A row, or None for one that is left out."""
        for line, fields in self._opened.records:
            self._num_read += 1
            try:
                yield self._row(line, fields)
            except _LeftOutError as left:
                where = f"{self._opened.name}:{line}"
                _count(self._dropped, left.reason, where, left.detail)
                yield None

    def report(self, num_kept: int) -> SourceReport:
        file = Path(self._opened.where)
        return SourceReport(
            name=self._opened.name,
            where=self._opened.where,
            revision=self._opened.revision,
            sha256=_sha256(file) if file.is_file() else None,
            num_read=self._num_read,
            num_kept=num_kept,
            dropped=self._dropped,
        )

    def _row(self, line: int, fields: object) -> Row:
        if isinstance(fields, RowError):
            raise _LeftOutError(UNREADABLE, str(fields))
        if not isinstance(fields, Mapping):
            raise _LeftOutError(UNREADABLE, "not a JSON object")
        if self._columns is None:
            self._columns = choose_columns(fields, self._published, self._opened.where)
        if self._settings.is_math and (mark := why_invalid(fields)):
            raise _LeftOutError(MARKED, mark)
        prompt, answer = fields.get(self._columns.prompt), self._columns.answer_of(fields)
        if answer is None:
            raise _LeftOutError(NO_ANSWER)
        if self._settings.is_math and isinstance(prompt, str):
            answer = with_percent_sign(prompt, answer)
        try:
            row = to_row({"prompt": prompt, "answer": answer}, _COLUMNS, self._opened.name, line)
        except RowError as error:
            raise _LeftOutError(UNREADABLE, str(error)) from error
        if self._settings.is_math and (problem := check_gold(answer)):
            raise _LeftOutError(BAD_ANSWER, problem)
        return row


class _LeftOutError(ValueError):
    """Why a row is left out."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _fitting(
    rows: Iterable[Row], settings: Preparation, dropped: dict[str, Dropped]
) -> Iterator[Row]:
    """The rows whose prompts the tokenizer takes; all of them without one."""
    tokenizer, limit = settings.tokenizer, settings.max_prompt_tokens
    if tokenizer is None:
        yield from rows
        return
    control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")
    remaining = iter(rows)
    while chunk := list(islice(remaining, ENCODE_CHUNK)):
        lengths = map(len, tokenizer.encode_batch([row.prompt for row in chunk]))
        for row, length in zip(chunk, lengths, strict=True):
            if spelled := control.search(row.prompt):
                _count(dropped, CONTROL_TOKEN, row.where, repr(spelled.group()))
            elif not 0 < length <= limit:
                _count(dropped, OVERLONG, row.where, f"{length} tokens")
            else:
                yield row


def _count(dropped: dict[str, Dropped], reason: str, where: str, detail: str) -> None:
    entry = dropped.setdefault(reason, Dropped())
    entry.count += 1
    if len(entry.examples) < MAX_EXAMPLES:
        entry.examples.append(f"{where}: {detail}" if detail else where)


def _subset(rows: list[Row], settings: Preparation) -> list[Row]:
    if settings.max_problems is None or settings.max_problems >= len(rows):
        return rows
    # RandomState, whose stream is promised never to change.
    order = np.random.RandomState(settings.seed).permutation(len(rows))
    return [rows[index] for index in sorted(order[: settings.max_problems])]


def _write(
    rows: Sequence[Row], output: Path, settings: Preparation, reports: Sequence[SourceReport]
) -> None:
    manifest = manifest_path(output)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    partial_manifest = manifest.with_name(f".{manifest.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        (_write_jsonl if output.suffix == ".jsonl" else _write_parquet)(rows, partial)
        described = _manifest(rows, settings, reports) | {"sha256": _sha256(partial)}
        partial_manifest.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for file in (partial, partial_manifest):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        partial_manifest.replace(manifest)
        partial.replace(output)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
        partial_manifest.unlink(missing_ok=True)


def _write_jsonl(rows: Sequence[Row], file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json_line(_fields(row)))


def _write_parquet(rows: Sequence[Row], file: Path) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_fields(row) for row in rows]), file)


def _fields(row: Row) -> dict[str, str]:
    return {"prompt": row.prompt, "answer": row.answer, "source": row.source, "id": row.where}


def _manifest(
    rows: Sequence[Row], settings: Preparation, reports: Sequence[SourceReport]
) -> dict[str, object]:
    tokenizer = settings.tokenizer
    return {
        "num_problems": len(rows),
        "answers": "math" if settings.is_math else "text",
        "max_prompt_tokens": None if tokenizer is None else settings.max_prompt_tokens,
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "max_problems": settings.max_problems,
        "seed": settings.seed,
        "sources": [
            {
                "name": report.name,
                "where": report.where,
                "revision": report.revision,
                "sha256": report.sha256,
                "num_read": report.num_read,
                "num_kept": report.num_kept,
                "dropped": {
                    reason: {"count": entry.count, "examples": entry.examples}
                    for reason, entry in report.dropped.items()
                },
            }
            for report in reports
        ],
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
