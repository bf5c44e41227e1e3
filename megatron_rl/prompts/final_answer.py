"""The final answer of a row of a published set, or what the set says against the row."""

import math
from collections.abc import Mapping

from megatron_rl.prompts.rows import LeftOutError, alone, preview, texts_in
from megatron_rl.reward.extract import last_box
from megatron_rl.reward.placeholder import is_placeholder

MARKED = "row that its set marks as invalid or as a proof"
NO_ANSWER = "no final answer"
SEVERAL = "several answers, and nothing says whether one or all of them are asked for"

_VALID = ("yes", "true", "valid", "1", "1.0")
# Each ends a worked solution, and the answer follows: in MATH as PRM800K splits it, in GSM8K.
_MARKERS = ("The answer is:", "####")


def final_answer(value: object, *, joins: bool = False) -> str | None:
    r"""The answer in a column that may hold a worked solution; None where it holds none.

    Examples: 27.0 -> "27"; "9 * 2 = 18\n#### 18" -> "18"; "So \boxed{x} is it." -> "x";
    ["42"] and '["42"]' -> "42"; ["$69$", "$84$"] -> "$69$, $84$" with joins.

    Args:
        joins: a list of several is an answer in parts.

    Raises:
        LeftOutError: a list of several answers, or the text of one.
        RowError: the text of an object, or of a list that cannot be read.
    """
    if isinstance(value, str):
        value = texts_in(value) or value
    if isinstance(value, list | tuple):
        parts = list(dict.fromkeys(final_answer(item, joins=joins) for item in value))
        if None in parts or not parts:
            return None
        if len(parts) > 1 and not joins:
            raise LeftOutError(SEVERAL, preview(value))
        return ", ".join(filter(None, parts))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if not isinstance(value, str):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value == int(value) else str(value)
    for marker in _MARKERS:
        if marker in value:
            return value.rpartition(marker)[2].strip() or None
    if "\\boxed" in value:
        return last_box(value)
    return value.strip() or None


def box_of(worked: object) -> str | None:
    """The answer of a worked solution: behind a marker or in the last box, else None."""
    worked = alone(worked)
    if not isinstance(worked, str):
        return None
    has_marker = any(marker in worked for marker in _MARKERS)
    return final_answer(worked) if has_marker else last_box(worked)


def answer_of(values: list[object], worked: object, *, joins: bool = False) -> str:
    """The final answer: the first that is one among the values, else that of the solution.

    Raises:
        LeftOutError: there is none, or a word in its place (`proof`, `notfound`).
    """
    for value in values:
        answer = final_answer(value, joins=joins)
        if answer is not None and not is_placeholder(answer):
            return answer
    answer = box_of(worked)
    if answer is None or is_placeholder(answer):
        raise LeftOutError(NO_ANSWER)
    return answer


def why_invalid(fields: Mapping[str, object]) -> str | None:
    """What the set itself says against a row; None where it says nothing.

    NuminaMath-1.5 has problem_is_valid and solution_is_valid ("Yes", "Incomplete", ...), and a
    question_type that may be "proof".
    """
    for name, value in fields.items():
        if isinstance(name, str) and name.endswith("is_valid") and value is not None:
            says = str(value).strip().casefold()
            if says not in _VALID:
                return f"{name}={preview(value)}"
    kind = fields.get("question_type")
    is_proof = isinstance(kind, str) and kind.strip().casefold() == "proof"
    return "question_type='proof'" if is_proof else None
