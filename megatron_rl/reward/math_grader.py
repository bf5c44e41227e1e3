"""The mathematics verifier: exact layers here, symbolic.py in a worker for what they leave open.

`grade` runs in the trainer and is bounded, whatever a response holds. No torch here: workers import
this module.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.reward.answers import Pair, decide
from megatron_rl.reward.extract import last_box

VerdictName = Literal["correct", "wrong", "no_answer", "timeout", "error"]
"""Value of megatron_rl.types.Verdict; the enum itself lives next to torch."""


@dataclass(frozen=True, slots=True)
class Graded:
    """What the exact layers say: a verdict, or the pair a worker has to compare."""

    extracted: str | None
    verdict: VerdictName | None = None
    pair: Pair | None = None


def grade(response: str, gold: str) -> Graded:
    """Extract the answer and compare it exactly; microseconds, whatever the response holds."""
    answer = last_box(response)
    if answer is None:
        return Graded(None, "no_answer")
    if not gold.strip():
        return Graded(answer, "error")  # nothing to compare with; check_gold finds it beforehand
    outcome = decide(gold, answer)
    if isinstance(outcome, Pair):
        return Graded(answer, pair=outcome)
    return Graded(answer, "correct" if outcome else "wrong")
