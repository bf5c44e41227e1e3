"""Gold answers before training: those that cannot be used are found, a percent sign is restored."""

import re

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.extract import MAX_ANSWER_CHARS, last_box
from megatron_rl.reward.kinds import make_judge
from megatron_rl.reward.normalize import is_balanced, normalize
from megatron_rl.reward.placeholder import is_placeholder

FORMS = {
    "box": "\\boxed{%s}",
    "answer_tag": "<answer>%s</answer>",
    "answer_line": "Answer: %s",
    "response": "%s",
}
"""reward.answer_in -> a response that holds nothing but an answer, %s."""

_ASKS_PERCENT = re.compile(
    r"\b(?:what|which|find the|how many|as an?|(?:nearest|closest)(?: \w+)?) percent", re.IGNORECASE
)
_BARE_NUMBER = re.compile(r"[-+]?[0-9][0-9.,/ ]*")


def check_gold(answer: str, config: RewardConfig | None = None) -> str | None:
    """The reason why no response could be right by this gold answer, or None where one could.

    A user's function may read the answer in any way: then it is only checked that there is one.
    """
    config = config or RewardConfig()
    if not answer.strip():
        return "the answer is empty"
    judge = make_judge(config.kind, config)
    if judge is None or config.kind == "format":
        return None
    if config.kind == "math" and is_placeholder(answer):
        return "it is a placeholder: the set has no answer there"
    if "####" in answer:
        return "it is a worked solution; use what stands after ####"
    if config.kind != "number" and len(answer) > MAX_ANSWER_CHARS:
        return f"the answer has {len(answer)} characters; at most {MAX_ANSWER_CHARS} are compared"
    problem = _math_problem(answer) if config.kind == "math" else None
    graded = judge(FORMS[config.answer_in].replace("%s", answer), answer, None)
    if problem is None and graded.verdict != "correct":
        problem = graded.reason or "it is not graded correct against itself"
    return problem


def with_percent_sign(question: str, answer: str) -> str:
    r"""The answer with the percent sign that its question implies.

    A gold `50\%` accepts 50, 50% and 0.5; a gold `5` does not accept 5%. Golds leave the sign out
    about as often as not, and only the question tells which is meant.
    """
    is_bare = _BARE_NUMBER.fullmatch(answer.strip()) is not None
    return answer.strip() + "\\%" if is_bare and _ASKS_PERCENT.search(question) else answer


def _math_problem(answer: str) -> str | None:
    if not is_balanced(answer):
        return "its braces are not balanced, so no box can hold it"
    if "\\boxed" in answer or last_box(answer) is not None:
        return "it holds a box itself; use what is in the box"
    if not normalize(answer):
        return "nothing is left of it after normalisation"
    return None
