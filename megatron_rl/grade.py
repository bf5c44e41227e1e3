"""`megatron-rl grade`: the reward of a recipe on responses that came from anywhere.

It shows people how their reward judges their own data before they spend GPUs on it.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from megatron_rl.errors import InputError
from megatron_rl.prompts.formats import SUFFIXES, format_of, read_records
from megatron_rl.prompts.layouts import MISSING, Layout, RowReader, find, look_ahead, recognise
from megatron_rl.prompts.rows import (
    LeftOutError,
    Problems,
    RowError,
    answer_text,
    column_list,
    preview,
)
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.gold import check_gold
from megatron_rl.reward.scorer import RewardScorer, Score
from megatron_rl.reward.trial import NUM_TRIED
from megatron_rl.types import Verdict

_LINES_AT_A_TIME = 2048
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class GradeFields:
    """Names of the fields that a line of the file has, and how to read the response."""

    response: str = "response"
    answer: str | None = None  # None: by the layout of the columns, else "answer"
    tokens: str | None = None  # the response's number of tokens, for a length penalty
    opens_thought: bool = False  # prompts ended in <think>: responses start inside a thought


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # in the file, from 1
    fields: dict[str, Any]
    response: str
    answer: str
    num_tokens: int | None
    opens_thought: bool


@dataclass(slots=True)
class _Tally:
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    reward: float = 0.0
    failures: list[str] = field(default_factory=list)
    answers: dict[str, str | None] = field(default_factory=dict)  # why none could match it


def grade_file(
    source: Path, output: Path, config: RewardConfig, fields: GradeFields = GradeFields()
) -> None:
    """Write every line of a file back, as JSON, with verdict, extracted, reward and seconds.

    The output is there as a whole or not at all. Raises InputError with every bad line, by number,
    before anything is graded.
    """
    _check_paths(source, output)
    if fields.tokens is None and "length_penalty" in config.kinds.values():
        raise InputError(
            "grade: length_penalty needs the number of tokens of each response. Name the field "
            "that holds it with --tokens-key, or leave the part out"
        )
    layout = _layout_of(source, fields)
    if layout is not None:
        print(f"layout: {layout.name} ({layout.columns})")
    reader = _Reader(source, fields, layout)
    num_lines, answers = _check_lines(reader)
    started = time.monotonic()
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        scorer = RewardScorer(config, answers)
        tally = _grade_lines(reader, partial, scorer, config, num_lines)
        partial.replace(output)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
    _report(tally, time.monotonic() - started, output)


def _check_paths(source: Path, output: Path) -> None:
    if not source.is_file():
        raise InputError(f"{source}: there is no such file. Name a file to grade")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: its directory is not there. Make it first")
    if output.is_dir() or (output.exists() and output.samefile(source)):
        what = "a directory" if output.is_dir() else "the file to grade"
        raise InputError(f"--output {output}: it is {what}. Name another file")


def _layout_of(source: Path, names: GradeFields) -> Layout | None:
    """The published layout of the answers; None where one column holds them as they stand."""
    if format_of(source) is None:
        raise InputError(f"{source}: its ending is not one of {', '.join(SUFFIXES)}")
    if names.answer is not None:
        return None
    first, _ = look_ahead(read_records(source))
    layout = recognise(first, None, None)
    return None if layout is None or layout.as_it_stands else layout


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the lines of a file, as often as they are asked for."""

    file: Path
    names: GradeFields
    layout: Layout | None

    def lines(self) -> Iterator[tuple[int, "_Line | RowError"]]:
        for number, parsed in read_records(self.file):
            try:
                yield number, self._line(number, parsed)
            except RowError as error:
                yield number, error
            except LeftOutError as left:
                yield number, RowError(left.reason)

    def _line(self, number: int, parsed: object) -> _Line:
        if isinstance(parsed, RowError):
            raise parsed
        if not isinstance(parsed, dict):
            raise RowError(f"{preview(parsed)} is not a JSON object")
        response = self._value(parsed, self.names.response)
        if not isinstance(response, str):
            raise RowError(f"{self.names.response}={preview(response)}: must be text")
        return _Line(
            number=number,
            fields=parsed,
            response=response,
            answer=self._answer(parsed),
            num_tokens=self._num_tokens(parsed),
            opens_thought=self.names.opens_thought,
        )

    def _answer(self, parsed: dict[str, Any]) -> str:
        if self.layout is not None:
            return RowReader(layout=self.layout, source=self.file.stem).answer(parsed)
        name = self.names.answer or "answer"
        return answer_text(name, self._value(parsed, name))

    def _num_tokens(self, parsed: dict[str, Any]) -> int | None:
        if self.names.tokens is None:
            return None
        found = self._value(parsed, self.names.tokens)
        if type(found) is not int or found < 0:
            raise RowError(f"{self.names.tokens}={preview(found)}: must be a number of tokens")
        return found

    def _value(self, parsed: dict[str, Any], name: str) -> object:
        value = find(parsed, name)
        if value is MISSING:
            raise RowError(f"no field {name!r}; it has {column_list(parsed)}")
        return value


def _check_lines(reader: _Reader) -> tuple[int, list[str]]:
    """The number of lines, and their first answers."""
    problems, num_lines, answers = Problems(str(reader.file)), 0, list[str]()
    for number, line in reader.lines():
        num_lines += 1
        if isinstance(line, RowError):
            problems.add(f"line {number}", str(line))
        elif len(answers) < NUM_TRIED:
            answers.append(line.answer)
    problems.raise_if_any(
        "Mend or remove these lines; name the fields with --response-key and --answer-key"
    )
    if num_lines == 0:
        raise InputError(f"{reader.file}: it has no line to grade")
    return num_lines, answers


def _grade_lines(
    reader: _Reader, partial: Path, scorer: RewardScorer, config: RewardConfig, num_lines: int
) -> _Tally:
    tally = _Tally()
    lines = (line for _, line in reader.lines() if isinstance(line, _Line))
    console = Console(stderr=True)
    try:
        with partial.open("x", encoding="utf-8") as file, Progress(
            console=console, transient=True, disable=not console.is_terminal
        ) as progress:  # fmt: skip
            task = progress.add_task("grading", total=num_lines)
            while chunk := list(islice(lines, _LINES_AT_A_TIME)):
                for line, score in _scored(chunk, scorer, config, tally):
                    file.write(json.dumps(line.fields | _graded(score, config)) + "\n")
                progress.advance(task, len(chunk))
            file.flush()
            os.fsync(file.fileno())
    finally:
        scorer.close()
    return tally


def _scored(
    chunk: list[_Line], scorer: RewardScorer, config: RewardConfig, tally: _Tally
) -> Iterator[tuple[_Line, Score]]:
    for line in chunk:
        scorer.submit(
            (line.number, 0),
            line.response,
            line.answer,
            line.num_tokens,
            opens_thought=line.opens_thought,
        )
    scores = scorer.collect()
    for line in chunk:
        score = scores[line.number, 0]
        tally.verdicts[score.verdict] += 1
        if score.has_failed:
            tally.failures.append(f"  line {line.number}: {score.verdict}, {score.reason}")
        else:
            tally.reward += score.reward
        if line.answer not in tally.answers:
            problem = check_gold(line.answer, config)
            place = f"  line {line.number}: {preview(line.answer)}: {problem}"
            tally.answers[line.answer] = place if problem else None
        yield line, score


def _graded(score: Score, config: RewardConfig) -> dict[str, Any]:
    graded: dict[str, Any] = {
        "verdict": str(score.verdict),
        "extracted": score.extracted,
        "reward": None if score.has_failed else score.reward,
        "seconds": round(score.seconds, 6),
    }
    return graded | ({"reward_parts": dict(score.parts)} if config.parts else {})


def _report(tally: _Tally, seconds: float, output: Path) -> None:
    total = tally.verdicts.total()
    print(f"{total} responses graded in {seconds:.1f} s")
    for verdict in Verdict:
        count = tally.verdicts[verdict]
        print(f"  {verdict:10} {count:8}  {count / total:7.2%}")
    judged = total - tally.verdicts[Verdict.TIMEOUT] - tally.verdicts[Verdict.ERROR]
    if judged:
        print(f"mean reward {tally.reward / judged:.4f}")
    _print_first("failed verifications", tally.failures)
    _print_first(
        "answers by which no response could be right",
        [problem for problem in tally.answers.values() if problem],
    )
    print(f"written to {output}")


def _print_first(what: str, lines: list[str]) -> None:
    if lines:
        print(f"{len(lines)} {what}:", *lines[:_MAX_SHOWN], sep="\n")
