import pytest

from megatron_rl.reward import extract
from megatron_rl.reward.extract import (
    MAX_ANSWER_CHARS,
    MAX_OPENERS,
    TAIL_CHARS,
    is_answer_form,
    last_answer_line,
    last_answer_tag,
    last_box,
    last_number,
    whole_response,
)

THOUGHT = "<think>so \\boxed{5}"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Thus $\\boxed{4}$.", "4"),
        ("\\boxed {4}", "4"),
        ("\\boxed{ 4 }", "4"),
        ("\\boxed 4", "4"),
        ("\\boxed4", "4"),
        ("\\fbox{4}", "4"),
        ("\\boxed{3}, no: \\boxed{4}", "4"),
        ("\\boxed{3}, no: \\fbox{4}", "4"),
        ("\\fbox{3}, no: \\boxed{4}", "4"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{x\\right.}", "\\left\\{x\\right."),
        ("\\boxed{4} as asked, in a \\boxed.", "4"),
        ("\\boxed{4} and \\boxedsymbol", "4"),
        (f"{THOUGHT}</think> \\boxed{{4}}", "4"),
        ("so \\boxed{5}</think> \\boxed{4}", "4"),
        ("\\boxed{4}" + " " * (TAIL_CHARS - 9), "4"),
        ("\\boxed{" + "7" * MAX_ANSWER_CHARS + "}", "7" * MAX_ANSWER_CHARS),
        # nothing to grade
        ("", None),
        ("the answer is 4", None),
        ("\\boxed{}", None),
        ("\\boxed{ }", None),
        ("\\boxed{4}, so \\boxed{}", None),
        ("so $x=3$ and \\boxed{4", None),
        ("\\boxed{3} and then \\boxed{4", None),
        ("\\boxed", None),
        (THOUGHT, None),
        (f"{THOUGHT}</think>", None),
        (f"\\boxed{{4}}{THOUGHT}", None),
        ("\\boxed{" + "7" * (MAX_ANSWER_CHARS + 1) + "}", None),
        ("\\boxed{3}\\boxed{" + "7" * 10_000 + "}", None),
        ("\\boxed{4}" + " " * TAIL_CHARS, None),
    ],
)
def test_last_box(response, answer):
    assert last_box(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed " * 100_000,
        "\\fbox " * 100_000,
        "\\boxed{" * 100_000,
        "\\boxed{4} " + "\\boxed " * 99,
    ],
)
def test_number_of_boxes_looked_at_is_bounded(response, monkeypatch):
    looks = []
    box_content = extract._box_content
    monkeypatch.setattr(
        extract, "_box_content", lambda *args: looks.append(args) or box_content(*args)
    )
    assert last_box(response) is None
    assert len(looks) <= MAX_OPENERS


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so <answer>4</answer>", "4"),
        ("<answer> 4\n</answer>", "4"),
        ("<answer>3</answer> no, <answer>4</answer> then", "4"),
        ("<think>x</think><answer>4</answer>", "4"),
        ("<answer>$\\boxed{4}$</answer>", "4"),
        ("<answer>\\boxed{4</answer>", None),
        ("<answer></answer>", None),
        ("<answer>4", None),
        ("<answer>3</answer><answer>4", None),
        ("<think><answer>4</answer>", None),
        ("4</answer>", None),
        (f"<answer>{'7' * (MAX_ANSWER_CHARS + 1)}</answer>", None),
        ("<answer>" * 100_000, None),
    ],
)
def test_last_answer_tag(response, answer):
    assert last_answer_tag(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so\nAnswer: 34", "34"),
        ("so\nanswer: 34\n", "34"),
        ("so\r\nANSWER : 34\r\n", "34"),
        ("**Answer:** 34", "34"),
        ("**Answer**: 34", "34"),
        ("**Answer: 34**", "34"),
        ("Answer: **34**", "34"),
        ("__Answer:__ 34", "34"),
        ("### Answer: 34", "34"),
        ("> - **Answer:** `34`", "34"),
        ("Answer: $34$.", "$34$."),
        ("Answer\uff1a34", "34"),
        ("Answer: $\\boxed{34}$", "34"),
        ("Answer: the answer: 34", "the answer: 34"),
        ("Answer: 33\nno,\nAnswer: 34\nas asked for in the Answer: line", "34"),
        ("\u0130\u0130\u0130\nAnswer: \u0130", "\u0130"),  # whose lower case is longer
        ("Answer: \ud800", "\ud800"),
        ("<think>Answer: 33</think>\nAnswer: 34", "34"),
        ("Answer: " + "7" * MAX_ANSWER_CHARS, "7" * MAX_ANSWER_CHARS),
        # nothing to grade
        ("", None),
        ("34", None),
        ("\\boxed{34}", None),
        ("The answer: 34", None),  # the line begins with another word
        ("Answers: 34", None),
        ("Answer 34", None),
        ("Answer:", None),
        ("Answer: **", None),
        ("Answer: 33\nAnswer:\n34", None),
        ("Answer: \\boxed{34", None),
        ("<think>Answer: 34", None),
        ("Answer: " + "7" * (MAX_ANSWER_CHARS + 1), None),
        ("Answer: 33\nAnswer: " + "7" * 10_000, None),
        ("Answer: 34\n" + " " * TAIL_CHARS, None),
        ("answer " * 100_000, None),
        ("#" * 100_000 + "Answer: 34", None),
    ],
)
def test_last_answer_line(response, answer):
    assert last_answer_line(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (" 4\n", "4"),
        ("<think>long</think> 4", "4"),
        ("", None),
        ("<think>4", None),
        ("7" * (MAX_ANSWER_CHARS + 1), None),
    ],
)
def test_whole_response(response, answer):
    assert whole_response(response) == answer


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("5 apples and 7 pears", "7"),
        ("it costs $1,234.50.", "1,234.50"),
        ("#### 72", "72"),
        ("x = -3", "-3"),
        ("10-12", "12"),
        ("from 3 to -12%", "-12%"),
        ("about 3/4 of it", "3/4"),
        (".5 or so", ".5"),
        ("L is 4.5e33 or 4.5e-3", "4.5e-3"),
        ("see 2e", "2"),
        ("No.5", "5"),
        ("a,5", "5"),
        ("f(3)-2", "2"),
        ("1,000, or not", "1,000"),
        ("in 2024 she had 7", "7"),
        ("<think>5</think> none", None),
        ("none", None),
        ("", None),
        ("1" * 100_000, None),
        ("1," * 50_000, None),
    ],
)
def test_last_number(response, number):
    assert last_number(response) == number


@pytest.mark.parametrize(
    ("response", "has_form"),
    [
        ("<think>a</think><answer>4</answer>", True),
        ("<think>a</think>\n<answer>\n4\n</answer>\n", True),
        ("a</think><answer>4</answer>", True),  # the prompt opened the reasoning
        ("reasons <answer>4</answer>", True),
        ("<answer>4</answer>", True),
        ("<think>a<answer>4</answer>", False),
        ("<think>a</think> well <answer>4</answer>", False),
        ("<think>a</think><think>b</think><answer>4</answer>", False),
        ("<answer>4</answer> and so on", False),
        ("<answer>3</answer><answer>4</answer>", False),
        ("<answer> </answer>", False),
        ("4", False),
    ],
)
def test_answer_form(response, has_form):
    assert is_answer_form(response) is has_form
