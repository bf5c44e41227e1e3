"""The mathematics verifier: exact rules here, symbolic.py in a worker for what they leave open.

`grade` runs in the trainer, and its time is bounded, whatever a response holds. Workers import this
module, so it does not import torch.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_rl.reward.answers import decide
from megatron_rl.reward.extract import Finder, last_box
from megatron_rl.reward.relations import Pair

VerdictName = Literal["correct", "wrong", "no_answer", "timeout", "error"]
"""The values of megatron_rl.types.Verdict, whose module imports torch."""


@dataclass(frozen=True, slots=True)
class Graded:
    """A judge's result on a response: a verdict, a value, or the pair for a worker to compare."""

    extracted: str | None
    verdict: VerdictName | None = None
    pair: Pair | None = None
    value: float | None = None  # from a reward that gives no verdict
    reason: str | None = None  # why there was an error


def grade(response: str, gold: str, find: Finder = last_box) -> Graded:
    """Extract the answer and compare it exactly; microseconds, whatever the response holds."""
    answer = find(response)
    if answer is None:
        return Graded(None, "no_answer")
    if not gold.strip():
        # A run does not get here: check_gold finds such answers before training.
        return Graded(answer, "error", reason="no gold answer")
    outcome = decide(gold, answer)
    if isinstance(outcome, Pair):
        return Graded(answer, pair=outcome)
    return Graded(answer, "correct" if outcome else "wrong")
