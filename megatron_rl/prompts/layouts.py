"""The layouts in which sets are published: which column holds what, known by the first rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice

from megatron_rl.errors import InputError
from megatron_rl.prompts.chat import question_of, response_of, to_chat
from megatron_rl.prompts.final_answer import MARKED, answer_of, why_invalid
from megatron_rl.prompts.formats import Record
from megatron_rl.prompts.nested import looks_like_messages, nested_value
from megatron_rl.prompts.rows import (
    Chat,
    LeftOutError,
    Row,
    RowError,
    answer_text,
    column_list,
    preview,
    refuse_nested,
    text_of,
)
from megatron_rl.reward.placeholder import is_placeholder

NUM_LOOKED_AT = 50  # rows by which a layout is known: the first may be the broken one
RESPONSE = "response"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The columns of one layout; `a.b` is b within a, and a number is a place in a list."""

    name: str
    prompt: str
    answers: tuple[str, ...] = ()  # the first that holds an answer counts
    solution: str | None = None  # worked; its answer counts where the columns above hold none
    has: tuple[str, ...] = ()  # more columns by which it is known
    of_chats: bool = False  # known by a prompt that is a list of messages
    mark: str = ""  # known by this text in the answer
    as_it_stands: bool = False  # the answer is not looked for in what its column holds
    joins: bool = False  # a list of several answers is one answer in parts

    def fits(self, record: object, needs_answer: bool = True) -> bool:
        """True where a record has the layout's columns."""
        prompt = find(record, self.prompt)
        answers = [column for column in self.answers if _has(record, column)]
        if prompt is MISSING or not all(_has(record, column) for column in self.has):
            return False
        if self.of_chats and not _is_chat(prompt):
            return False
        if self.mark and not any(self.mark in str(find(record, column)) for column in answers):
            return False
        has_solution = self.solution is not None and _has(record, self.solution)
        return bool(answers) or has_solution or not needs_answer

    @property
    def columns(self) -> str:
        """The columns as a person reads them: "prompt, reward_model.ground_truth"."""
        rest = [*self.answers, *filter(None, [self.solution])]
        return ", ".join([self.prompt, *rest])


PROMPTS = Layout(name="prompt and answer", prompt="prompt", answers=("answer",), as_it_stands=True)
"""The layout that `prepare` writes."""

CHATS = Layout(
    name="ms-swift",
    prompt="messages",
    answers=("solution", "answer", "ground_truth", "label"),
    of_chats=True,
)

NAMED = "columns that were named"

LAYOUTS = (
    Layout(name="verl", prompt="prompt", answers=("reward_model.ground_truth",)),
    Layout(name="ORZ", prompt="0", answers=("1.ground_truth.value",)),
    Layout(name="OpenRLHF", prompt="context_messages", answers=("label", "answer")),
    Layout(name="slime", prompt="prompt", answers=("label",)),
    Layout(
        name="OpenR1-Math",
        prompt="problem",
        answers=("answer",),
        solution="solution",
        has=("generations",),
    ),
    Layout(
        name="NuminaMath-1.5",
        prompt="problem",
        answers=("answer",),
        solution="solution",
        has=("question_type", "problem_is_valid"),
    ),
    Layout(
        name="NuminaMath-CoT", prompt="problem", solution="solution", has=("source", "messages")
    ),
    Layout(name="Big-Math", prompt="problem", answers=("answer",), has=("llama8b_solve_rate",)),
    Layout(name="MATH", prompt="problem", answers=("answer",), solution="solution", has=("level",)),
    Layout(
        name="DeepScaleR",
        prompt="problem",
        answers=("answer",),
        solution="solution",
        has=("answer", "solution"),
    ),
    Layout(name="DeepMath", prompt="question", answers=("final_answer",), has=("r1_solution_1",)),
    Layout(
        name="OlympiadBench",
        prompt="question",
        answers=("final_answer",),
        has=("subfield",),
        joins=True,
    ),
    Layout(name="GSM8K", prompt="question", answers=("answer",), mark="####"),
    Layout(name="AReaL", prompt="prompt", answers=("solutions",)),
    CHATS,
    Layout(
        name="TRL",
        prompt="prompt",
        answers=("solution", "ground_truth", "answer"),
        of_chats=True,
    ),
    PROMPTS,
    *(
        Layout(
            name=f"{prompt} and answer",
            prompt=prompt,
            answers=("answer", "final_answer", "expected_answer", "ground_truth", "label"),
            solution="solution",
        )
        for prompt in ("problem", "question", "prompt", "query", "input", "instruction")
    ),
)
"""The first that fits is taken, so the more special ones stand first."""


def recognise(
    records: Sequence[object], prompt: str | None, answer: str | None, needs_answer: bool = True
) -> Layout | None:
    """The layout of a set by its first records; None where none fits.

    prompt, answer: columns that somebody named, in place of the layout's.
    """
    are_named = prompt is not None and answer is not None
    layouts = [with_columns(layout, prompt, answer) for layout in LAYOUTS]
    if are_named:  # they may be those of a layout; the last one takes any
        layouts = [layout for layout in layouts[:-1] if layout.name != NAMED] + layouts[-1:]
    for record in records:
        for layout in layouts:
            if layout.fits(record):
                return layout
    if needs_answer:
        return None
    for record in records:
        for layout in (PROMPTS, CHATS):
            named = with_columns(layout, prompt, None)
            if named.fits(record, needs_answer=False):
                return replace(named, answers=())
    return None


def with_columns(layout: Layout, prompt: str | None, answer: str | None) -> Layout:
    """The layout with columns that somebody named; an answer is then taken as it stands.

    Where the column is one of the layout's, its solution still counts where there is no answer.
    """
    if prompt is not None and prompt != layout.prompt:
        layout = replace(layout, name=NAMED, prompt=prompt)
    if answer is None:
        return layout
    if answer in layout.answers:
        return replace(layout, answers=(answer,), as_it_stands=True)
    return replace(layout, name=NAMED, answers=(answer,), solution=None, mark="", as_it_stands=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Makes rows of the records of one set."""

    layout: Layout
    source: str  # name of the set
    response: str | None = None  # column of the response to imitate; None: not read
    needs_answer: bool = True
    heeds_marks: bool = True  # leave out rows that the set itself marks as invalid

    def read(self, line: int, fields: object) -> Row:
        """The row of a record.

        Raises:
            RowError: a column is missing or cannot be used.
            LeftOutError: the set has no answer there, or says that the row is invalid.
        """
        if isinstance(fields, RowError):
            raise fields
        if not isinstance(fields, Mapping) and not self.layout.prompt.isdigit():
            raise RowError(f"{preview(fields)} is not a JSON object")
        self._check_columns(fields)
        if self.heeds_marks and isinstance(fields, Mapping):
            mark = why_invalid(fields)
            if mark is not None:
                raise LeftOutError(MARKED, mark)
        value = find(fields, self.layout.prompt)
        whole = to_chat(self.layout.prompt, value)
        chat = None if whole is None else question_of(self.layout.prompt, whole)
        if chat is None and isinstance(value, str):
            refuse_nested(value)
        return Row(
            prompt=text_of(self.layout.prompt, value) if chat is None else chat[-1][1],
            answer=self.answer(fields),
            response=None if self.response is None else self._response(fields, whole),
            source=self.source,
            line=line,
            chat=chat,
        )

    def _check_columns(self, fields: object) -> None:
        layout = self.layout
        missing = [] if _has(fields, layout.prompt) else [layout.prompt]
        answers = [*layout.answers, *filter(None, [layout.solution])]
        if self.needs_answer and not any(_has(fields, column) for column in answers):
            missing.append(answers[0])
        if missing:
            has = column_list(fields) if isinstance(fields, Mapping) else preview(fields)
            raise RowError(f"no column {', '.join(map(repr, missing))}; it has {has}")

    def answer(self, fields: object) -> str:
        """The answer of a record, whose columns are those of the layout; raises as read() does."""
        found = [(name, find(fields, name)) for name in self.layout.answers]
        found = [(name, value) for name, value in found if value is not MISSING]
        if not found and not self.needs_answer:
            return ""
        has_solution = self.layout.solution is not None and _has(fields, self.layout.solution)
        if self.layout.as_it_stands and not (has_solution and _is_no_answer(found[0][1])):
            return answer_text(*found[0])
        worked = find(fields, self.layout.solution or "") if has_solution else None
        try:
            answer = answer_of([value for _, value in found], worked, joins=self.layout.joins)
        except LeftOutError:
            if self.needs_answer:
                raise
            return ""
        return text_of(self.layout.columns, answer)

    def _response(self, fields: object, chat: Chat | None) -> str:
        assert self.response is not None
        value = find(fields, self.response)
        if value is MISSING and chat is not None:
            value = response_of(chat)
        if value is MISSING:
            raise RowError(f"no column {self.response!r}, and no turn of the assistant")
        return text_of(self.response, value)


def look_ahead(records: Iterator[Record]) -> tuple[list[object], Iterator[Record]]:
    """The first usable records, and all of them again."""
    first = list(islice(records, NUM_LOOKED_AT))
    usable = [record for _, record in first if not isinstance(record, RowError)]
    return usable, chain(first, records)


MISSING = object()
"""What find() gives where there is no such column."""


def find(record: object, column: str) -> object:
    """The value of a column, `a.b` being b within a; MISSING where there is none.

    An object on the way may be the text of one, as in CSV files.
    """
    if isinstance(record, Mapping) and column in record:
        return record[column]
    value = record
    for name in column.split("."):
        if isinstance(value, str):
            value = nested_value(value)
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list | tuple) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            return MISSING
    return value


def _is_chat(value: object) -> bool:
    """True for a list of messages or the text of one."""
    if isinstance(value, str):
        return looks_like_messages(value)
    return isinstance(value, Sequence)


def _is_no_answer(value: object) -> bool:
    return value is None or (
        isinstance(value, str) and (not value.strip() or is_placeholder(value))
    )


def _has(record: object, column: str) -> bool:
    return find(record, column) is not MISSING


def no_layout(where: str, records: Sequence[object], way_out: str) -> InputError:
    """The error of a set whose columns say nothing."""
    first = records[0] if records else None
    has = column_list(first) if isinstance(first, Mapping) else preview(first)
    return InputError(
        f"{where}: its columns are those of no layout that is known; the first row has {has}. "
        f"{way_out}"
    )
