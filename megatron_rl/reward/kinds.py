"""The judges of the rewards that have a name: each grades a response at once, in microseconds.

A user's function has no judge: it runs in workers only.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial

from megatron_rl.reward.answers import decide, size_of
from megatron_rl.reward.config import PartConfig, RewardConfig
from megatron_rl.reward.extract import (
    Finder,
    is_answer_form,
    last_answer_line,
    last_answer_tag,
    last_box,
    last_number,
    whole_response,
)
from megatron_rl.reward.math_grader import Graded, grade
from megatron_rl.reward.normalize import normalize
from megatron_rl.reward.units import split_unit

Judge = Callable[[str, str, int | None], Graded]
"""Grades a response, given the gold answer and the response's number of tokens."""

_FINDERS: dict[str, Finder] = {
    "box": last_box,
    "answer_tag": last_answer_tag,
    "answer_line": last_answer_line,
    "response": whole_response,
}


def make_judge(kind: str, config: RewardConfig, part: PartConfig | None = None) -> Judge | None:
    """The judge of a kind of reward, which runs in this process; None for a user's function."""
    find = _FINDERS[config.answer_in]
    if kind == "math":
        return lambda response, answer, _: grade(response, answer, find)
    if kind == "exact":
        return partial(_judge_text, find)
    if kind == "number":
        find = last_number if config.answer_in == "response" else find
        return partial(_judge_number, find, Fraction(str(config.tolerance)))
    if kind == "format":
        return partial(_judge_format, find, config.answer_in == "answer_tag")
    if kind == "length_penalty":
        assert part is not None
        assert part.free_tokens is not None
        assert part.max_tokens is not None
        return partial(_judge_length, part.free_tokens, part.max_tokens)
    return None


def _judge_text(find: Finder, response: str, answer: str, _: int | None) -> Graded:
    found = find(response)
    if found is None:
        return Graded(None, "no_answer")
    return Graded(found, "correct" if found.split() == answer.split() else "wrong")


def _judge_number(
    find: Finder, tolerance: Fraction, response: str, answer: str, _: int | None
) -> Graded:
    found = find(response)
    if found is None:
        return Graded(None, "no_answer")
    gold = _number(answer)
    if gold is None:
        return Graded(found, "error", reason=f"the gold answer {answer!r} is not a number")
    value = _number(found)
    is_near = value is not None and abs(value - gold) <= tolerance * abs(gold)
    return Graded(found, "correct" if is_near or decide(answer, found) is True else "wrong")


def _number(text: str) -> Fraction | None:
    return size_of(split_unit(normalize(text)))


def _judge_format(
    find: Finder, is_strict: bool, response: str, answer: str, _: int | None
) -> Graded:
    found = find(response)
    has_form = found is not None and (not is_strict or is_answer_form(response))
    return Graded(found, "correct" if has_form else "no_answer")


def _judge_length(
    free_tokens: int, max_tokens: int, response: str, answer: str, num_tokens: int | None
) -> Graded:
    """0 up to free_tokens, falling to -1 at max_tokens (DAPO's, arXiv:2503.14476, eq. 13)."""
    if num_tokens is None:
        raise ValueError("length_penalty: the number of tokens of the response is not given")
    excess = (num_tokens - free_tokens) / (max_tokens - free_tokens)
    return Graded(None, value=-min(max(excess, 0.0), 1.0))
