import pytest

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.gold import check_gold, with_percent_sign
from megatron_rl.reward.math_grader import grade


@pytest.mark.parametrize(
    "answer", ["4", r"\frac12", "(1,2)", r"\text{Evelyn}", "x=5", "1,000", r"10,\!080", "$69$,$84$"]
)
def test_usable_golds(answer):
    assert check_gold(answer) is None


@pytest.mark.parametrize(
    "answer",
    ["proof", "Proof.", r"\text{Proof}", "notfound", "NotFound", "**not found**", "N/A", "(n/a)",
     "<missing>", "[omitted]", "NaN", "see  solution"],
)  # fmt: skip
def test_placeholders_are_no_answers(answer):
    assert "placeholder" in check_gold(answer)
    assert check_gold(answer, RewardConfig(kind="exact")) is None  # a label of somebody's own


@pytest.mark.parametrize("answer", ["None", "no solution", "undefined", r"\emptyset", "0", "n"])
def test_answers_that_look_like_placeholders(answer):
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
        ("She has 2 + 2. #### 4", "worked solution"),
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


@pytest.mark.parametrize(
    ("settings", "answer", "reason"),
    [
        ({"kind": "number"}, "1,080", None),
        ({"kind": "number", "answer_in": "response"}, "4.5e33", None),
        ({"kind": "number"}, "seventy", "'seventy' is not a number"),
        ({"kind": "exact"}, "New York {", "against itself"),
        ({"kind": "exact", "answer_in": "response"}, "New York {", None),
        ({"kind": "exact", "answer_in": "answer_tag"}, "</answer>", "against itself"),
        ({"answer_in": "answer_line"}, r"\frac12", None),
        ({"answer_in": "answer_line"}, "1,\n2", "against itself"),
        ({"kind": "exact", "answer_in": "answer_line"}, "New York {", None),
        ({"kind": "exact", "answer_in": "answer_line"}, "*", "against itself"),
        ({"kind": "format"}, "anything", None),
        ({"kind": "a.b:c"}, "#### {", None),  # a function makes of it what it wants
        ({"kind": "a.b:c"}, " ", "empty"),
    ],
)
def test_golds_of_other_rewards(settings, answer, reason):
    problem = check_gold(answer, RewardConfig(**settings))
    assert problem is None if reason is None else reason in problem


def test_percent_answer_counts_where_the_question_asked_for_it():
    assert grade(r"\boxed{50\%}", r"50\%").verdict == "correct"
    assert grade(r"\boxed{50\%}", "50").verdict == "wrong"
