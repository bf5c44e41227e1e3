import pytest

from megatron_rl.reward.gold import check_gold, with_percent_sign
from megatron_rl.reward.math_grader import grade


@pytest.mark.parametrize(
    "answer", ["4", r"\frac12", "(1,2)", r"\text{Evelyn}", "x=5", "1,000", r"10,\!080", "$69$,$84$"]
)
def test_usable_golds(answer):
    assert check_gold(answer) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("7" * 513, "513 characters"),
        ("{4", "braces"),
        ("4}{", "braces"),
        (r"\boxed{4}", "box"),
        ("\u200b\u202e", "nothing is left"),
        ("1, 2, <think>", "against itself"),
    ],
)
def test_unusable_golds(answer, reason):
    assert reason in check_gold(answer)


@pytest.mark.parametrize(
    ("question", "answer", "prepared"),
    [
        ("What percent of the cars are red?", "50", r"50\%"),
        ("Find it to the nearest percent.", "12.5", r"12.5\%"),
        ("What is 20 percent of 250?", "50", "50"),
        ("How many cars are red?", "50", "50"),
        ("What percent are red?", r"50\%", r"50\%"),
        ("What percent are red?", "x", "x"),
    ],
)
def test_percent_sign_comes_from_the_question(question, answer, prepared):
    assert with_percent_sign(question, answer) == prepared


def test_percent_answer_counts_where_the_question_asked_for_it():
    assert grade(r"\boxed{50\%}", r"50\%").verdict == "correct"
    assert grade(r"\boxed{50\%}", "50").verdict == "wrong"
