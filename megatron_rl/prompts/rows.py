"""Rows of a data set: a usable one, and the faults that make others unusable."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.errors import InputError

MAX_SHOWN = 10
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row of a data set."""

    prompt: str
    answer: str
    response: str | None  # None where only prompts are asked for
    source: str  # name of the data set
    line: int  # in its file, from 1

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Columns:
    """The names of a data set's columns by what they hold."""

    prompt: str
    answer: str
    response: str | None  # None: not read

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.prompt, self.answer, self.response) if name is not None)


class Problems:
    """Collects the faults of a data set, to report all of them at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.num_problems = 0
        self._shown: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.num_problems += 1
        if len(self._shown) < MAX_SHOWN:
            self._shown.append(f"  {place}: {problem}")

    def raise_if_any(self, way_out: str) -> None:
        if not self.num_problems:
            return
        hidden = self.num_problems - len(self._shown)
        lines = [*self._shown, f"  and {hidden} more"] if hidden else self._shown
        noun = "row" if self.num_problems == 1 else "rows"
        heading = f"{self.where}: {self.num_problems} unusable {noun}"
        raise InputError("\n".join([heading, *lines, way_out]))


class RowError(ValueError):
    """The reason why one row cannot be used; it becomes a line of Problems."""


def to_row(fields: object, columns: Columns, source: str, line: int) -> Row:
    """The row made of a record's columns; RowError where a column is missing or unusable."""
    if not isinstance(fields, Mapping):
        raise RowError(f"{preview(fields)} is not a JSON object")
    missing = [name for name in columns.names if name not in fields]
    if missing:
        raise RowError(f"no column {', '.join(map(repr, missing))}; it has {column_list(fields)}")
    return Row(
        prompt=_text(columns.prompt, fields[columns.prompt]),
        answer=answer_text(columns.answer, fields[columns.answer]),
        response=(
            None if columns.response is None else _text(columns.response, fields[columns.response])
        ),
        source=source,
        line=line,
    )


def json_line(fields: Mapping[str, object]) -> str:
    """The object as one line of JSON that people can read, whatever its language.

    Characters that only some readers take for the end of a line are escaped.
    """
    return json.dumps(fields, ensure_ascii=False).translate(_LINE_ENDS) + "\n"


def column_list(fields: Mapping[str, object]) -> str:
    return ", ".join(repr(str(name)) for name in fields) or "none"


def preview(value: object) -> str:
    # ascii(), since a lone surrogate cannot be printed.
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def answer_text(column: str, value: object) -> str:
    """The answer as text: a number is written out (27.0 -> "27.0"), a list of one is unpacked."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{column}={value}: must be finite")
        return str(value)
    return _text(column, value, rule="must be text, a number, or a list of one of them")


def _text(column: str, value: object, rule: str = "must be text") -> str:
    if not isinstance(value, str):
        raise RowError(f"{column}={preview(value)}: {rule}")
    if not value.strip():
        raise RowError(f"{column}={preview(value)}: must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{column}={preview(value)}: holds half a surrogate pair") from None
    return value
