"""Rows of a data set: a usable one, and the faults that make others unusable."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rl.errors import InputError
from megatron_rl.prompts.nested import looks_nested, nested_value

MAX_SHOWN = 10
UNUSABLE = "prompts.max_unusable_frac"

Chat = tuple[tuple[str, str], ...]
"""Role and text of every turn; the roles are system, user and assistant."""

_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row of a data set."""

    prompt: str  # the question; of a chat, its last turn
    answer: str  # "" where only responses are asked for and the set has no answers
    response: str | None  # None where only prompts are asked for
    source: str  # name of the data set
    line: int  # in its file, from 1
    chat: Chat | None = None  # the whole question where the set has it as a chat

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


class Problems:
    """Collects the faults of a data set, to report all of them at once."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.num_problems = 0
        self.shown: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.num_problems += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(f"  {place}: {problem}")

    def raise_if_more(self, most_frac: float, num_rows: int) -> None:
        """Raise InputError where more than that share of the rows is unusable."""
        if self.num_problems > most_frac * num_rows:
            needed = math.ceil(1000 * self.num_problems / num_rows) / 1000
            self.raise_if_any(
                "Mend or remove these rows"
                + ("" if needed >= 1 else f", or have them skipped: {UNUSABLE}={needed:g}")
            )

    def raise_if_any(self, way_out: str) -> None:
        if not self.num_problems:
            return
        hidden = self.num_problems - len(self.shown)
        lines = [*self.shown, f"  and {hidden} more"] if hidden else self.shown
        noun = "row" if self.num_problems == 1 else "rows"
        heading = f"{self.where}: {self.num_problems} unusable {noun}"
        raise InputError("\n".join([heading, *lines, way_out]))


class RowError(ValueError):
    """The reason why one row cannot be used; it becomes a line of Problems."""


class LeftOutError(ValueError):
    """The reason why a good row has no part: the set itself has no answer there."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class LeftOut:
    """Rows left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first few, with what is wrong

    def add(self, where: str, detail: str, most: int = 3) -> None:
        self.count += 1
        if len(self.examples) < most:
            self.examples.append(f"{where}: {detail}" if detail else where)


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
    """The answer as text: a number is written out (27.0 -> "27.0"), a list of one is unpacked.

    So is the text of a list of one text, ["42"]; [1, 2] may be an interval and stays.
    """
    value = alone(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowError(f"{column}={value}: must be finite")
        return str(value)
    return text_of(column, value, rule="must be text, a number, or a list of one of them")


def alone(value: object) -> object:
    """The one item of a list of one, or of the text of a list of one text; else the value."""
    if isinstance(value, str):
        texts = texts_in(value)
        return value if texts is None or len(set(texts)) != 1 else texts[0]
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def texts_in(value: str) -> list[str] | None:
    """The texts of a text such as ["42"], as JSON or Python write it; None: it is something else.

    Raises:
        RowError: it is an object, or a list that cannot be read.
    """
    items = nested_value(value)
    if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
        return items
    refuse_nested(value)
    return None


def refuse_nested(value: str) -> None:
    """Raise RowError for a text that is an object or a list of texts or messages."""
    if looks_nested(value):
        raise RowError(
            f"{preview(value)}: is the text of a list or an object and no plain text. Name what is "
            "wanted of it, a.b being b within a, or write the column as JSON"
        )


def text_of(column: str, value: object, rule: str = "must be text") -> str:
    """The value, if it is text that can be used; else RowError."""
    if not isinstance(value, str):
        raise RowError(f"{column}={preview(value)}: {rule}")
    if not value.strip():
        raise RowError(f"{column}={preview(value)}: must not be empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{column}={preview(value)}: holds half a surrogate pair") from None
    return value
