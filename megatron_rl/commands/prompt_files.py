"""Prompt files out of published problems: what is read, what is left out and why."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_rl.commands.published import Published, find_published, layout_of
from megatron_rl.errors import InputError
from megatron_rl.prompts.layouts import RowReader, look_ahead
from megatron_rl.prompts.overlap import normalised
from megatron_rl.prompts.rows import Chat, LeftOut, LeftOutError, Row, RowError, json_line
from megatron_rl.prompts.source import OpenedData, open_data
from megatron_rl.prompts.token_table import ENCODE_CHUNK
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.reward.gold import check_gold, with_percent_sign

SUFFIXES = (".jsonl", ".parquet")
"""The formats that are written."""

UNREADABLE = "row that cannot be read"
BAD_ANSWER = "answer that no response could match"
OVERLONG = "prompt over the token limit"
CONTROL_TOKEN = "prompt that spells a control token"
HELD_OUT = "problem that also stands in a held-out set"

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
    held_out: tuple[str, ...] = ()  # sets whose problems are left out


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The outcome of reading one set."""

    name: str
    where: str
    revision: str | None  # commit on the hub
    sha256: str | None  # of a local file
    layout: str  # its name, and the columns that were read
    note: str | None  # on files of a directory that were not read
    num_read: int
    last_line: int  # of the file; blank ones count
    num_kept: int
    dropped: Mapping[str, LeftOut]


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
    held_out = _held_out(settings)
    sets: dict[str, int] = {}  # name -> which of the datasets it is
    for number, opened, published in _open_all(settings):
        _refuse_output(opened, output)
        if sets.setdefault(opened.name, number) != number:
            raise InputError(
                f"--dataset: two sets are called {opened.name!r}, so ids would not be unique. "
                "Rename one of the files"
            )
        dropped: dict[str, LeftOut] = {}
        # The shards of a set are one set, whose rows are counted through.
        before = sum(report.last_line for report in reports if report.name == opened.name)
        reader = _Reader(settings, published, opened, dropped, held_out, before)
        kept = [row for row in progress(reader.rows(), opened) if row is not None]
        kept = list(_fitting(kept, settings, dropped))
        reports.append(reader.report(len(kept)))
        rows += kept
    if not rows:
        raise InputError("\n".join(["--dataset: no row is left:", *_why_dropped(reports)]))
    _write(_subset(rows, settings), output, settings, reports)
    return reports


def _held_out(settings: Preparation) -> frozenset[str]:
    """The problems of the held-out sets, as normalised() has them."""
    datasets = replace(settings, datasets=settings.held_out, prompt_key=None, answer_key=None)
    found = set()
    for _, opened, published in _open_all(replace(datasets, split=None)):
        rows = _Reader(replace(datasets, is_math=False), published, opened, {}).rows()
        found |= {normalised(row.prompt) for row in rows if row is not None}
    return frozenset(found)


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


def _open_all(settings: Preparation) -> Iterator[tuple[int, OpenedData, Published]]:
    """Number of the dataset, each of its files, and its columns."""
    for number, dataset in enumerate(settings.datasets):
        name, published = find_published(dataset)
        split = settings.split or published.split
        for opened in open_data(published.path, split, setting="--dataset"):
            is_named = name != published.path
            yield number, replace(opened, name=name) if is_named else opened, published


class _Reader:
    """Reads the rows of one set, and counts those that are left out."""

    def __init__(
        self,
        settings: Preparation,
        published: Published,
        opened: OpenedData,
        dropped: dict[str, LeftOut],
        held_out: frozenset[str] = frozenset(),
        before: int = 0,
    ) -> None:
        """before: lines of the same set in files that were read before."""
        self._settings, self._opened = settings, opened
        self._dropped, self._held_out = dropped, held_out
        first, self._records = look_ahead(opened.records)
        keys = (settings.prompt_key, settings.answer_key)
        self._layout = layout_of(published, first, opened.where, *keys)
        self._reader = RowReader(
            layout=self._layout, source=opened.name, heeds_marks=settings.is_math
        )
        self._num_read, self._last_line = 0, before
        self._before = before

    def rows(self) -> Iterator[Row | None]:
        """A row, or None for one that is left out."""
        for line_of_file, fields in self._records:
            self._num_read += 1
            line = self._last_line = self._before + line_of_file
            where = f"{self._opened.name}:{line}"
            try:
                yield self._row(line, fields)
            except RowError as error:
                _count(self._dropped, UNREADABLE, where, str(error))
                yield None
            except LeftOutError as left:
                _count(self._dropped, left.reason, where, left.detail)
                yield None

    def report(self, num_kept: int) -> SourceReport:
        file = Path(self._opened.where)
        return SourceReport(
            name=self._opened.name,
            where=self._opened.where,
            revision=self._opened.revision,
            sha256=_sha256(file) if file.is_file() else None,
            layout=f"{self._layout.name} ({self._layout.columns})",
            note=self._opened.note,
            num_read=self._num_read,
            last_line=self._last_line - self._before,
            num_kept=num_kept,
            dropped=self._dropped,
        )

    def _row(self, line: int, fields: object) -> Row:
        row = self._reader.read(line, fields)
        if self._settings.is_math:
            row = replace(row, answer=with_percent_sign(row.prompt, row.answer))
            if problem := check_gold(row.answer):
                raise LeftOutError(BAD_ANSWER, problem)
        if self._held_out and normalised(row.prompt) in self._held_out:
            raise LeftOutError(HELD_OUT)
        return row


def _fitting(
    rows: Iterable[Row], settings: Preparation, dropped: dict[str, LeftOut]
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


def _count(dropped: dict[str, LeftOut], reason: str, where: str, detail: str) -> None:
    dropped.setdefault(reason, LeftOut()).add(where, detail)


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


def _fields(row: Row) -> dict[str, object]:
    prompt = row.prompt if row.chat is None else _messages(row.chat)
    return {"prompt": prompt, "answer": row.answer, "source": row.source, "id": row.where}


def _messages(chat: Chat) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in chat]


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
                "layout": report.layout,
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
