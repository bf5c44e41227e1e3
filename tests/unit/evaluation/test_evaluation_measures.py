"""Measures and votes against numbers worked out by hand, and against other implementations."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megatron_rl.evaluation.measures import Bootstrap, measure, overall, pass_chance, scores
from megatron_rl.evaluation.question import Question
from megatron_rl.evaluation.votes import MathEquality, majority

BOOTSTRAP = Bootstrap(resamples=2000, confidence=0.95, seed=3)


def question(votes, *, number=0, majority=None, truncated=0, tokens=10):
    """One vote a response: "+x" a correct answer x, "x" a wrong one, "" none, "!x" failed."""
    verdicts = {"+": "correct", "!": "timeout"}
    return Question(
        number=number,
        prompt="p",
        answer="a",
        responses=("r",) * len(votes),
        verdicts=tuple(verdicts.get(vote[:1], "wrong") if vote else "no_answer" for vote in votes),
        extracted=tuple(vote.lstrip("+!") or None for vote in votes),
        tokens=(tokens,) * len(votes),
        truncated=tuple(index < truncated for index in range(len(votes))),
        majority=majority,
    )


def by_text(pairs):
    return dict.fromkeys(pairs, False)


@pytest.mark.parametrize(("correct", "samples", "k"), [(0, 5, 2), (2, 5, 2), (4, 5, 2), (1, 6, 6)])
def test_pass_chance_is_the_share_of_subsets_with_a_correct_one(correct, samples, k):
    outcomes = [1] * correct + [0] * (samples - correct)
    subsets = list(combinations(outcomes, k))
    share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
    assert pass_chance(correct, samples, k) == pytest.approx(float(share), abs=1e-15)


def test_scores_of_a_question_by_hand():
    measured = scores(question(["+1", "2", "", "!3"], truncated=1, tokens=7, majority=0.5))
    assert measured == {
        "average_at_4": 0.25,
        "pass_at_2": pytest.approx(1 - 3 / 6),
        "pass_at_4": 1.0,
        "truncated_frac": 0.25,
        "wrong_frac": 0.25,
        "no_answer_frac": 0.25,
        "timeout_frac": 0.25,
        "error_frac": 0.0,
        "response_tokens_mean": 7.0,
        "majority_at_4": 0.5,
    }


@pytest.mark.parametrize(
    ("votes", "chance"),
    [
        (["+1", "+1", "2", "3"], 1.0),  # two against one each
        (["+1", "2", "2", "3"], 0.0),
        (["+1", "2", "3", ""], 1 / 3),  # three answers with one vote each
        (["+1", "+1", "2", "2"], 1 / 2),
        (["+1", "", "", ""], 1.0),  # no answer is no vote
        (["", "", "", ""], 0.0),
        (["2", "2", "", "3"], 0.0),
        (["+1", "+1.0", "2", "2"], 1 / 2),  # correct answers vote together, however written
        (["+1", "!2", "!2", ""], 0.0),  # a failed verification still is a vote
    ],
)
def test_a_vote_by_hand(votes, chance):
    assert majority([question(votes)], by_text) == [pytest.approx(chance)]


def test_equal_answers_vote_together():
    r"""1/2, 0.5 and \frac12 are one answer: three votes against two."""
    votes = ["+3", "+3", r"\frac12", "0.5", "1/2", "4"]
    assert majority([question(votes)], by_text) == [1.0]
    assert majority([question(votes)], MathEquality(num_workers=1)) == [0.0]


def test_answers_that_the_exact_rules_leave_open_are_compared_by_workers():
    equality = MathEquality(num_workers=1)
    same, other = (r"\sqrt{8}x", r"2\sqrt{2}x"), (r"\sqrt{8}x", r"3\sqrt{2}x")
    assert equality([same, other]) == {same: True, other: False}


def test_only_questions_whose_outcome_is_open_are_compared():
    asked = []

    def equality(pairs):
        asked.extend(pairs)
        return {}

    decided = [question(["+1", "+1", "+1", "2", "3"]), question(["2", "3", "4", "", ""])]
    majority(decided, equality)
    assert asked == []
    majority([question(["+1", "2", "3"])], equality)
    assert asked == [("2", "3")]


def test_without_answers_there_is_no_vote():
    graded = question(["+", "+", ""])  # as a user's own function grades: no answer is known
    assert majority([graded], by_text) == [None]
    result = measure("b", [graded, question(["+1", "2", ""], majority=1.0)], BOOTSTRAP)
    assert "majority_at_3" not in result.measured


def test_responses_of_a_benchmark_are_counted_by_verdict():
    # Of the first question the first two responses were cut, of the second the first.
    graded = [
        question(["", "+1", "", "!3"], truncated=2),
        question(["", "2", "2", "+1"], truncated=1),
    ]
    result = measure("b", graded, BOOTSTRAP)
    assert result.verdicts == {
        "correct": 2, "wrong": 2, "no_answer": 3, "timeout": 1, "error": 0
    }  # fmt: skip
    assert result.num_failed == 1
    assert result.num_cut_short == 2
    shares = [result.measured[f"{name}_frac"].value for name in ("wrong", "no_answer", "timeout")]
    assert shares == [2 / 8, 3 / 8, 1 / 8]


def test_means_and_intervals_of_a_benchmark():
    """Accuracies of 0 or 1: the bootstrap mean is binomial, whose quantiles are known."""
    questions = [question(["+1" if number < 40 else "2"], number=number) for number in range(100)]
    result = measure("b", questions, BOOTSTRAP)
    average = result.measured["average_at_1"]
    assert average.value == pytest.approx(0.4, abs=1e-15)
    # Binomial(100, 0.4) / 100 has its 2.5 % quantile at 0.31 (0.30 sums to 2.48 %) and its 97.5 %
    # quantile at 0.50 (0.49 sums to 97.3 %): 2000 draws hit one of two. 5 % would be 0.32 and 0.48.
    assert 0.295 < average.low < 0.315
    assert 0.485 < average.high < 0.505
    again = measure("b", questions, BOOTSTRAP)
    assert again.measured == result.measured
    other = measure("b", questions, Bootstrap(resamples=2000, confidence=0.95, seed=4))
    assert not np.array_equal(other.means, result.means)
    narrow = measure("b", questions, Bootstrap(resamples=2000, confidence=0.5, seed=3))
    assert narrow.measured["average_at_1"].low > average.low


def test_one_outcome_has_no_interval():
    result = measure("b", [question(["+1"]), question(["+1"])], BOOTSTRAP)
    average = result.measured["average_at_1"]
    assert (average.value, average.low, average.high) == (1.0, 1.0, 1.0)


def test_overall_counts_every_benchmark_the_same():
    """1 of 1 and 0 of 9: the average is 1/2, not 1/10; only what both have is averaged."""
    small = measure("small", [question(["+1"], majority=1.0)], BOOTSTRAP)
    large = measure("large", [question(["2"]) for _ in range(9)], BOOTSTRAP)
    average = overall([small, large], BOOTSTRAP)
    assert average["average_at_1"].value == 0.5
    assert "majority_at_1" not in average


def test_the_interval_of_an_average_is_narrower_than_those_of_its_parts():
    results = [
        measure(name, [question(["+1" if n % 2 else "2"]) for n in range(60)], BOOTSTRAP)
        for name in ("one", "two", "three", "four")
    ]
    average = overall(results, BOOTSTRAP)["average_at_1"]
    part = results[0].measured["average_at_1"]
    # Independent parts: the width shrinks by the root of four.
    assert (average.high - average.low) / (part.high - part.low) == pytest.approx(0.5, abs=0.1)
