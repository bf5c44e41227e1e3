import io

import pytest
from rich.console import Console

from megatron_rl.metrics.console import (
    PlainDisplay,
    RichDisplay,
    SilentDisplay,
    TimeLeft,
    clean,
    open_display,
)

VALUES = {
    "reward/mean": 0.5,
    "reward/accuracy": 0.4375,
    "algorithms/kept_responses_frac": 0.625,
    "policy/kl_initial_k3": 0.00125,
    "policy/entropy_mean": 0.75,
    "rollout/entropy_estimate": 9.0,
    "rollout/response_tokens_mean": 312.5,
    "policy/grad_norm": 0.8125,
    "time/iteration_s": 6.0,
}


def test_plain_line_says_it_all():
    stream = io.StringIO()
    PlainDisplay(10, stream).write(3, VALUES)
    assert stream.getvalue() == (  # 7 iterations of 6 s are left
        "iteration 3/10  reward 0.500  accuracy 43.8%  kept 62.5%  kl 0.0013  entropy 0.750  "
        "length 312.5  grad norm 0.812  s/iter 6.0  eta 0:00:42\n"
    )


def test_plain_lines_come_at_most_once_a_second():
    stream, now = (
        io.StringIO(),
        iter([0.0, *[t for t in (10.0, 10.4, 10.9, 11.2, 11.3) for _ in "ab"]]),
    )
    display = PlainDisplay(5, stream, clock=lambda: next(now))
    for iteration in range(1, 6):
        measured = {"evaluation/aime24/average_at_8": 0.5} if iteration == 3 else {}
        display.write(iteration, {"reward/mean": 0.0, "time/iteration_s": 0.4, **measured})
    lines = [line.split()[1] for line in stream.getvalue().splitlines()]
    # first; too soon; evaluated (two lines); too soon after it; last
    assert lines == ["1/5", "3/5", "3/5", "5/5"]


def test_plain_line_leaves_out_what_was_not_measured():
    stream = io.StringIO()
    PlainDisplay(1, stream).write(1, {"rollout/entropy_estimate": 1.5, "time/iteration_s": 1.0})
    assert stream.getvalue() == "iteration 1/1  entropy 1.500  s/iter 1.0  eta 0:00:00\n"


def test_the_evaluation_at_the_start_tells_no_pace():
    clock = iter([0.0, 30.0, 40.0])
    left = TimeLeft(5, clock=lambda: next(clock))
    assert left.after(0, {"evaluation/math/average_at_1": 0.5}) == "-"
    assert left.after(1, {}) == "0:00:40"  # from 30 to 40, four times


def test_held_out_accuracy_has_its_own_line():
    stream = io.StringIO()
    PlainDisplay(4, stream).write(2, {"evaluation/aime24/average_at_8": 0.125})
    assert stream.getvalue().splitlines()[1] == "iteration 2/4  held-out aime24 average@8 12.5%"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;window title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link", "link"),
        ("a\nforged line", "a forged line"),
        ("bell\x07 back\x08 c1\x9b31m", "bell back c131m"),
        ("left\u202eright", "leftright"),
        ("end\x1b", "end"),
        ("caf\u00e9 \u03c0", "caf\u00e9 \u03c0"),
    ],
)
def test_text_cannot_steer_the_terminal(text, shown):
    assert clean(text) == shown


def test_notes_are_cleaned_and_not_read_as_markup():
    plain = io.StringIO()
    PlainDisplay(1, plain).say("model \x1b[2Jx [bold]y[/bold]")
    assert plain.getvalue() == "model x [bold]y[/bold]\n"

    rich = io.StringIO()
    RichDisplay(1, 0, Console(file=rich, force_terminal=False)).say("model x [bold]y[/bold]")
    assert rich.getvalue() == "model x [bold]y[/bold]\n"


def test_rich_table_has_a_header_then_a_row_per_iteration():
    stream = io.StringIO()
    display = RichDisplay(3, 0, Console(file=stream, force_terminal=True, width=120))
    display.write(1, VALUES)
    display.write(2, {**VALUES, "evaluation/math/average_at_1": 0.5})
    display.close()
    lines = [clean(line).rstrip() for line in stream.getvalue().splitlines()]
    header = next(line for line in lines if line.startswith("iteration"))
    first = next(line for line in lines if line.strip().startswith("1 "))
    headers = "iteration reward accuracy kept kl entropy length loss grad norm s/iter eta"
    cells = "1 0.500 43.8% 62.5% 0.0013 0.750 312.5 - 0.812 6.0 0:00:12"
    assert " ".join(header.split()) == headers
    assert " ".join(first.split()) == cells
    assert len(header) == len(first)  # right-aligned, so the last columns end together
    assert "held-out math average@1 50.0%" in stream.getvalue()


def test_time_left_follows_the_last_ten_iterations():
    left = TimeLeft(100, clock=lambda: 0.0)
    for iteration in range(1, 11):
        left.after(iteration, {"time/iteration_s": 1000.0})
    for iteration in range(11, 19):
        left.after(iteration, {"time/iteration_s": 10.0})
    # the last ten are 1000, then nine times 10: 109 s each; 81 are left: 8829 s
    assert left.after(19, {"time/iteration_s": 10.0}) == "2:27:09"


def test_time_left_counts_days():
    left = TimeLeft(10**6 + 1, clock=lambda: 0.0)
    assert left.after(1, {"time/iteration_s": 1.0}) == "11d 13:46:40"


def test_there_is_no_time_left_before_an_iteration_has_run():
    """The evaluation at the start took 7 s, which says nothing of an iteration."""
    plain, rich, ticks = io.StringIO(), io.StringIO(), iter([0.0, 7.0, 7.0, 67.0])
    evaluated = {"evaluation/math/average_at_1": 0.5}
    display = PlainDisplay(3, plain, clock=lambda: next(ticks))
    display.write(0, evaluated)
    assert plain.getvalue().splitlines() == [
        "iteration 0/3",
        "iteration 0/3  held-out math average@1 50.0%",
    ]
    RichDisplay(3, 0, Console(file=rich, force_terminal=False, width=120)).write(0, evaluated)
    (row,) = [line for line in rich.getvalue().splitlines() if line.strip().startswith("0 ")]
    assert row.split() == ["0", *"-" * 10]
    assert display._eta.after(1, {}) == "0:02:00"  # from the end of the evaluation on


def test_time_left_uses_its_own_clock_where_no_time_was_reported():
    ticks = iter([0.0, 30.0])
    assert TimeLeft(3, clock=lambda: next(ticks)).after(1, {}) == "0:01:00"


def test_style_auto_is_plain_where_the_output_is_no_terminal():
    assert isinstance(open_display("auto", 1, stream=io.StringIO()), PlainDisplay)
    assert isinstance(open_display("rich", 1, stream=io.StringIO()), RichDisplay)
    assert isinstance(open_display("silent", 1), SilentDisplay)


def test_style_auto_is_rich_on_a_terminal_that_can_move_its_cursor(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(open_display("auto", 1, stream=Terminal()), RichDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display("auto", 1, stream=Terminal()), PlainDisplay)


def test_off_shows_nothing(capsys):
    display = open_display("silent", 5)
    display.say("note")
    display.write(1, VALUES)
    display.close()
    assert capsys.readouterr().out == ""
