import pytest

from megatron_rl.reward import extract
from megatron_rl.reward.extract import MAX_ANSWER_CHARS, MAX_OPENERS, TAIL_CHARS, last_box

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
