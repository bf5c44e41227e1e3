"""Gold answers before training: which cannot be used, and what the question says about them."""

import re

from megatron_rl.reward.extract import MAX_ANSWER_CHARS, last_box
from megatron_rl.reward.math_grader import grade
from megatron_rl.reward.normalize import is_balanced, normalize

_ASKS_PERCENT = re.compile(
    r"\b(?:what|which|find the|how many|as an?|(?:nearest|closest)(?: \w+)?) percent", re.IGNORECASE
)
_BARE_NUMBER = re.compile(r"[-+]?[0-9][0-9.,/ ]*")


def check_gold(answer: str) -> str | None:
    """Why a gold answer cannot be used, or None when it can."""
    if not answer.strip():
        return "the answer is empty"
    if len(answer) > MAX_ANSWER_CHARS:
        return f"the answer has {len(answer)} characters; a box holds at most {MAX_ANSWER_CHARS}"
    if not is_balanced(answer):
        return "its braces are not balanced, so no box can hold it"
    if "\\boxed" in answer or last_box(answer) is not None:
        return "it holds a box itself; use what is in the box"
    if not normalize(answer):
        return "nothing is left of it after normalisation"
    if grade(rf"\boxed{{{answer}}}", answer).verdict != "correct":
        return "it is not graded correct against itself"
    return None


def with_percent_sign(question: str, answer: str) -> str:
    r"""The answer with the percent sign that its question implies.

    A gold `50\%` accepts 50, 50% and 0.5; a gold `5` does not accept 5%. Golds leave the sign out
    about as often as not, and only the question tells which is meant.
    """
    is_bare = _BARE_NUMBER.fullmatch(answer.strip()) is not None
    return answer.strip() + "\\%" if is_bare and _ASKS_PERCENT.search(question) else answer
