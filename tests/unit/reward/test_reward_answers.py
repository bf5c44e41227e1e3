"""Verdicts by hand, after the policy for ambiguous answers: tests/data/answer_pairs.yaml.

Every pair goes the whole way: box, exact layers, and a worker where those leave it open.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from reward_helpers import time_limit

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.math_grader import grade
from megatron_rl.reward.scorer import RewardScorer

DATA = Path(__file__).parents[2] / "data"
PAIRS = DATA / "answer_pairs.yaml"
# Answers of models with labels of others, which benchmarks/grading_responses.py took and names.
LABELLED = DATA / "labelled_answers.jsonl"
TABLE = yaml.safe_load(PAIRS.read_text("utf-8"))
NUMERIC = re.compile(r"[-+(]*(?:\d[\d.,]*|\\[dtc]?frac ?\{?\d+\}? ?\{?[1-9]\d*\}?|\d+/\d+)[%)]*")
EXACT_SECTIONS = ("words", "choices", "percent", "thousands")


class Case(NamedTuple):
    section: str
    gold: str
    text: str  # what stands in the box, or the whole response
    verdict: str

    @property
    def response(self):
        return self.text if self.section == "responses" else f"So it is $\\boxed{{{self.text}}}$."

    @property
    def expected(self):
        return self.verdict if self.text or self.section == "responses" else "no_answer"


CASES = [
    Case(section, gold, text, verdict)
    for section, verdicts in TABLE.items()
    for verdict, pairs in verdicts.items()
    for gold, text in pairs
]


@pytest.fixture(scope="module")
def scores():
    # A generous deadline: what is tested is the verdict, on however slow a machine.
    scorer = RewardScorer(RewardConfig(deadline_s=10.0))
    for number, case in enumerate(CASES):
        scorer.submit((number, 0), case.response, case.gold)
    with time_limit(300):
        scores = scorer.collect()
    yield scores
    scorer.close()


def test_answers_of_models_have_the_verdicts_of_their_labels():
    rows = [json.loads(line) for line in LABELLED.read_text("utf-8").splitlines()]
    assert len(rows) == 1000
    scorer = RewardScorer(RewardConfig(deadline_s=10.0))
    for number, row in enumerate(rows):
        scorer.submit((number, 0), f"So it is $\\boxed{{{row['answer']}}}$.", row["gold"])
    with time_limit(300):
        scores = scorer.collect()
    scorer.close()
    said = {row["where"]: str(scores[number, 0].verdict) for number, row in enumerate(rows)}
    assert said == {row["where"]: "correct" if row["right"] else "wrong" for row in rows}


@pytest.mark.parametrize("section", TABLE)
def test_verdicts(scores, section):
    wrong = [
        f"gold {case.gold!r}, answer {case.text!r}: {scores[number, 0].verdict}"
        for number, case in enumerate(CASES)
        if case.section == section and scores[number, 0].verdict != case.expected
    ]
    assert wrong == []


def test_what_was_extracted_is_told(scores):
    boxed = {n: case for n, case in enumerate(CASES) if case.section != "responses" and case.text}
    assert {n: scores[n, 0].extracted for n in boxed} == {n: c.text for n, c in boxed.items()}


def test_table_is_large_and_without_doubles():
    assert len(CASES) >= 500
    assert len({(case.response, case.gold) for case in CASES}) == len(CASES)


def test_numbers_and_words_need_no_worker():
    plain = [
        case
        for case in CASES
        if case.section in EXACT_SECTIONS
        or (NUMERIC.fullmatch(case.gold) and NUMERIC.fullmatch(case.text))
    ]
    assert len(plain) > 100
    assert [case for case in plain if grade(case.response, case.gold).pair] == []


@pytest.mark.parametrize(
    "text",
    ["\x00", "\ud800", "\u202e4", "\\", "{", "}{", "$$", "\\\\", "^", "_", "=", "%", "\\$", ","],
)
@pytest.mark.parametrize("gold", ["4", "(1,2)", r"\text{yes}", "x=5", "3:4", r"50\%"])
def test_odd_text_never_raises(text, gold):
    for answer in (text, text * 100, f"4{text}", f"{text}4"):
        assert grade(f"\\boxed{{{answer}}}", gold) is not None
