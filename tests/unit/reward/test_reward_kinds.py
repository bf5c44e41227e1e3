"""The rewards with a name, by hand."""

import pytest

from megatron_rl.reward.config import PartConfig, RewardConfig
from megatron_rl.reward.kinds import make_judge


def judge(response, answer, num_tokens=None, **settings):
    config = RewardConfig(**settings)
    return make_judge(config.kind, config)(response, answer, num_tokens)


@pytest.mark.parametrize(
    ("answer_in", "response", "verdict", "extracted"),
    [
        ("box", "\\boxed{New  York}", "correct", "New  York"),
        ("box", "\\boxed{new york}", "wrong", "new york"),
        ("box", "New York", "no_answer", None),
        ("answer_tag", "<answer>New York\n</answer>", "correct", "New York"),
        ("answer_tag", "\\boxed{New York}", "no_answer", None),
        ("answer_line", "so\n**Answer:** New York", "correct", "New York"),
        ("answer_line", "\\boxed{New York}", "no_answer", None),
        ("response", "<think>hm</think>New York", "correct", "New York"),
        ("response", "It is New York", "wrong", "It is New York"),
        ("response", "  ", "no_answer", None),
    ],
)
def test_exact(answer_in, response, verdict, extracted):
    graded = judge(response, "New York", kind="exact", answer_in=answer_in)
    assert (graded.verdict, graded.extracted) == (verdict, extracted)


@pytest.mark.parametrize(
    ("gold", "answer", "tolerance", "verdict"),
    [
        ("72", "72", 0, "correct"),
        ("72", "72.0", 0, "correct"),
        ("1,080", "1080", 0, "correct"),
        ("0.75", "3/4", 0, "correct"),
        ("72", "\\$72", 0, "correct"),
        ("72", "x = 72", 0, "correct"),
        ("0.5", "50\\%", 0, "correct"),
        ("4.5e33", "4.5 \\times 10^{33}", 0, "correct"),
        ("72", "73", 0, "wrong"),
        ("72", "\\sqrt{5184}", 0, "wrong"),  # equal, but a number is asked for
        ("72", "about", 0, "wrong"),
        ("100", "101", 0.01, "correct"),  # 1% of 100 is 1
        ("100", "101.1", 0.01, "wrong"),
        ("-100", "-99", 0.01, "correct"),
        ("0", "0.001", 0.01, "wrong"),  # of nothing 1% is nothing
        ("seventy", "70", 0, "error"),
        ("", "70", 0, "error"),
    ],
)
def test_number(gold, answer, tolerance, verdict):
    graded = judge(f"\\boxed{{{answer}}}", gold, kind="number", tolerance=tolerance)
    assert graded.verdict == verdict


def test_number_anywhere_is_the_last_one():
    settings = {"kind": "number", "answer_in": "response"}
    assert judge("5 apples and 7 pears", "7", **settings).verdict == "correct"
    assert judge("5 apples and 7 pears", "5", **settings).verdict == "wrong"
    assert judge("no apples", "5", **settings).verdict == "no_answer"
    assert judge("He pays $1,080.", "1080", **settings).extracted == "1,080"


@pytest.mark.parametrize(
    ("answer_in", "response", "verdict"),
    [
        ("box", "so \\boxed{5} it is", "correct"),  # the form, whatever the answer
        ("box", "so \\boxed{5", "no_answer"),
        ("answer_tag", "<think>a</think><answer>5</answer>", "correct"),
        ("answer_tag", "<answer>5</answer> it is", "no_answer"),
        ("answer_line", "so\nAnswer: 5", "correct"),
        ("answer_line", "so the answer is 5", "no_answer"),
    ],
)
def test_format(answer_in, response, verdict):
    assert judge(response, "4", kind="format", answer_in=answer_in).verdict == verdict


@pytest.mark.parametrize(
    ("num_tokens", "value"),
    [(0, 0.0), (3072, 0.0), (3328, -0.25), (3584, -0.5), (4096, -1.0), (9000, -1.0)],
)
def test_length_penalty(num_tokens, value):
    part = PartConfig(weight=1.0, free_tokens=3072, max_tokens=4096)
    graded = make_judge("length_penalty", RewardConfig(), part)("any", "4", num_tokens)
    assert (graded.value, graded.verdict) == (value, None)


@pytest.mark.parametrize(
    ("answer_in", "response"),
    [
        ("answer_tag", "<answer>1/2</answer>"),
        ("answer_line", "**Answer:** $\\frac{1}{2}$."),
        ("answer_line", "Answer: \\boxed{1/2}"),
        ("response", "1/2"),
    ],
)
def test_mathematics_reads_other_places_too(answer_in, response):
    assert judge(response, "0.5", answer_in=answer_in).verdict == "correct"


def test_a_number_behind_answer():
    settings = {"kind": "number", "answer_in": "answer_line"}
    assert judge("of 12\nAnswer: \\$1,080.", "1080", **settings).verdict == "correct"
    assert judge("Answer: 12\nand 1080", "1080", **settings).verdict == "wrong"


def test_a_users_function_is_not_judged_here():
    assert make_judge("a.b:c", RewardConfig(kind="a.b:c")) is None
