"""Placeholders are known by rules: what has no answer in it, against answers that look alike."""

from pathlib import Path

import pytest
import yaml

from megatron_rl.reward.gold import check_gold
from megatron_rl.reward.placeholder import is_placeholder

PAIRS = Path(__file__).parents[2] / "data" / "answer_pairs.yaml"

ABSENT = (
    "no final answer", "No answer found", "answer not found", "not-found", "notfound",
    "not_available", "Not available", "notApplicable", "not applicable", "not given", "unknown",
    "unavailable", "NA", "N/A", "n/a", "N.A.", "nil", "nan", "null", "none given", "TBD",
    "to be determined", r"\text{N/A}", "**Not found**", "Answer: not provided", "<unknown>",
    "[not found]", "Answer not given.", "No numerical answer", "no answer is required", "missing",
)  # fmt: skip
SIGNS = (
    "-",
    "--",
    "?",
    "???",
    "...",
    "…",
    "—",
    "____",
    "*",
    "$$",
    r"$\ldots$",
    r"\blacksquare",
    "∎",
)
ELSEWHERE = ("see above", "see figure", "See Figure 2.", "as shown above", "refer to the solution")
PROOFS = (
    "QED", "Q.E.D.", "proved", "Proof needed", "Proof.", "hence proved", "proof-based",
    r"\text{To be proved.}", "(proof omitted)", "The statement is proven",
)  # fmt: skip
CHINESE = ("证明", "略", "略。", "证明见解析", "详见解析", "证毕", "答案略", "暂无答案")

ANSWERS = (
    "None", "none", "undefined", "no solution", "No solutions", "no real solution", "DNE",
    "does not exist", "None of the above", "no value", "no such n exists", "not possible",
    "not enough information", "cannot be determined", "indeterminate", "never", "not prime",
    "unknown quantity", "null set", "empty set", "-1", "-x", "(-1,2)", "[0,1)", "{}", r"\{\}",
    "[]", "()", "∅", r"\emptyset", r"\infty", "+", "<", "=", "A", "B", "n", "a", "na", "Na", "0",
    "i", "Q", "e", "yes", "No", "1, 2, ..., n", "above", "proof by contradiction", "induction",
    "no unique answer", "not necessary", "无解", "不存在", "不成立", r"\perp",
)  # fmt: skip


@pytest.mark.parametrize("answer", [*ABSENT, *SIGNS, *ELSEWHERE, *PROOFS, *CHINESE])
def test_what_says_that_there_is_no_answer(answer):
    assert is_placeholder(answer)
    assert check_gold(answer) is not None


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_look_alike(answer):
    assert not is_placeholder(answer)


def test_no_gold_of_the_pairs_is_a_placeholder():
    sections = yaml.safe_load(PAIRS.read_text(encoding="utf-8")).values()
    golds = [gold for verdicts in sections for pairs in verdicts.values() for gold, *_ in pairs]
    assert len(golds) > 600
    assert [gold for gold in golds if is_placeholder(gold)] == []
