import pytest

from megatron_rl.prompts.overlap import normalised, overlaps
from megatron_rl.types import Prompt


def prompt(number, text):
    return Prompt(group_id=number, tokens=None, answer="1", text=text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $x^2$!", "find x^{2}"),
        ("What is\n  $1 + 1$?", "What is 1+1"),
        (r"Let \(x\) be $\left( 1, 2 \right)$.", "let x be (1,2)"),
        (r"Is $\dfrac12$ $5\text{ cm}$?", r"Is $\frac{1}{2}$ 5 cm?"),
        (
            "Solve the following math problem step by step. The last line of your response should "
            "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
            "problem.\n\nWhat is 1+1?\n\nRemember to put your answer on its own line after "
            '"Answer:".',
            "What is 1+1?",
        ),
        (
            r"What is 1+1? Let's think step by step and output the final answer within \boxed{}.",
            "What is 1+1?",
        ),
        (
            "What is 1+1?\nPlease reason step by step, and put your final answer within "
            r"\boxed{}.",
            "What is 1+1?",
        ),
        ("3 − 1", "3 - 1"),  # noqa: RUF001
        ("“Odd” numbers", '"odd" numbers'),
    ],
)
def test_copies_of_a_problem_are_one(one, other):
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("7+52?", "75+2?"), ("7-5", "7+5"), ("(1,2)", "12"), ("1.5", "15"), ("x", "y")],
)
def test_other_problems_stay_others(one, other):
    assert normalised(one) != normalised(other)


def test_questions_that_are_trained_on_are_told_with_their_rows():
    held_out = [prompt(0, "1+1?"), prompt(1, "2 + 2"), prompt(2, "3+3?")]
    assert overlaps(["1+1?", "2+2?", "9+9?"], {"sums": held_out, "others": held_out[2:]}) == [
        "contamination: 2 of 3 questions of sums are also trained on (1 to the letter, 1 but for "
        "spacing and signs), such as its rows 1, 2"
    ]
    assert overlaps(["1+1?"], {}) == []
