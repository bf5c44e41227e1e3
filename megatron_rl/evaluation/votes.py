"""The majority vote over the answers of one question, equal answers voting together.

A response votes with the answer that was found in it; one without an answer does not vote. All
responses graded correct vote together. The others vote together where their answers are equal as
mathematics: each joins the first earlier answer that it equals. Where several answers have the most
votes, each wins with equal chance, and the vote counts as its expected value.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from megatron_rl.evaluation.question import Question
from megatron_rl.reward.answers import decide
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.scorer import RewardScorer
from megatron_rl.types import Verdict

Pair = tuple[str, str]
Equality = Callable[[Sequence[Pair]], Mapping[Pair, bool]]
"""Says of each pair of answers whether they are equal; takes many, so that workers share them."""


def majority(questions: Sequence[Question], equality: Equality) -> list[float | None]:
    """The chance that the majority is right, for each question.

    It is None where a correct response has no answer to vote with, as under a user's own reward.
    """
    others = [_others(question) for question in questions]
    pairs = [
        pair
        for question, votes in zip(questions, others, strict=True)
        if 0 < question.num_correct <= votes.total()  # else the outcome is known without
        for pair in combinations(votes, 2)
    ]
    equal = equality(list(dict.fromkeys(pairs))) if pairs else {}
    return [_chance(*each, equal) for each in zip(questions, others, strict=True)]


def _others(question: Question) -> Counter[str]:
    """Answer -> votes for it among the responses that are not correct, in order of appearance."""
    return Counter(
        answer
        for answer, verdict in zip(question.extracted, question.verdicts, strict=True)
        if answer is not None and verdict != Verdict.CORRECT
    )


def _chance(question: Question, votes: Counter[str], equal: Mapping[Pair, bool]) -> float | None:
    correct = question.num_correct
    answers = dict(zip(question.verdicts, question.extracted, strict=True))
    if correct and answers[Verdict.CORRECT] is None:
        return None
    classes: dict[str, int] = {}
    for answer, count in votes.items():
        first = next((one for one in classes if equal.get((one, answer))), answer)
        classes[first] = classes.get(first, 0) + count
    most = max(classes.values(), default=0)
    if correct < most or not correct:
        return 0.0
    ties = sum(count == correct for count in classes.values())
    return 1 / (1 + ties)


class MathEquality:
    """Equality of answers as the reward `math` sees it, whatever the run's own reward is."""

    def __init__(self, num_workers: int) -> None:
        """num_workers: processes that compare what the exact rules leave open."""
        self._num_workers = num_workers

    def __call__(self, pairs: Sequence[Pair]) -> dict[Pair, bool]:
        """True for equal answers, False where they differ or comparing fails; the first is gold."""
        outcomes = {pair: decide(*pair) for pair in pairs}
        equal = {pair: outcome is True for pair, outcome in outcomes.items()}
        undecided = [pair for pair, outcome in outcomes.items() if not isinstance(outcome, bool)]
        return equal | self._verified(undecided)

    def _verified(self, pairs: Sequence[Pair]) -> dict[Pair, bool]:
        if not pairs:
            return {}
        scorer = RewardScorer(RewardConfig(num_workers=self._num_workers))
        try:
            for number, (gold, answer) in enumerate(pairs):
                scorer.submit((number, 0), rf"\boxed{{{answer}}}", gold)
            scores = scorer.collect()
        finally:
            scorer.close()
        return {
            pair: scores[number, 0].verdict is Verdict.CORRECT for number, pair in enumerate(pairs)
        }
