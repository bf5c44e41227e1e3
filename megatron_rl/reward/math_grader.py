"""The mathematics verifier: exact layers here, symbolic.py in a worker for what they leave open.

`grade` runs in the trainer and is bounded, whatever a response holds. No torch here: workers import
this module.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.reward.answers import decide
from megatron_rl.reward.extract import Finder, last_box
from megatron_rl.reward.relations import Pair

VerdictName = Literal["correct", "wrong", "no_answer", "timeout", "error"]
"""Value of megatron_rl.types.Verdict; the enum itself lives next to torch."""


@dataclass(frozen=True, slots=True)
class Graded:
    """What is said of a response at once: a verdict, a value, or the pair a worker compares."""

    extracted: str | None
    verdict: VerdictName | None = None
    pair: Pair | None = None
    value: float | None = None  # of a reward that gives no verdict
    reason: str | None = None  # of an error


def grade(response: str, gold: str, find: Finder = last_box) -> Graded:
    """Extract the answer and compare it exactly; microseconds, whatever the response holds."""
    answer = find(response)
    if answer is None:
        return Graded(None, "no_answer")
    if not gold.strip():
        return Graded(answer, "error", reason="no gold answer")  # check_gold finds it beforehand
    outcome = decide(gold, answer)
    if isinstance(outcome, Pair):
        return Graded(answer, pair=outcome)
    return Graded(answer, "correct" if outcome else "wrong")
