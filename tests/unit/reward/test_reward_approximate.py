"""Closed expressions told apart by their values; Python's own floats are the reference."""

import math
import time

import pytest

from megatron_rl.reward.approximate import surely_differ

VALUES = [
    (r"\sqrt{2}", math.sqrt(2)),
    (r"2 \sqrt{3}", 2 * math.sqrt(3)),
    (r"\sqrt[3]{5}", 5 ** (1 / 3)),
    (r"\frac{3 \sqrt{2}}{4}", 3 * math.sqrt(2) / 4),
    (r"\frac{1}{2}+\frac{\pi}{3}", 0.5 + math.pi / 3),
    (r"-\pi", -math.pi),
    (r"2 \pi-\sqrt{5}", 2 * math.pi - math.sqrt(5)),
    (r"(1+\sqrt{2})(3-\sqrt{2})", (1 + math.sqrt(2)) * (3 - math.sqrt(2))),
    (r"3\frac{1}{2}", 3.5),
    (r"-3\frac{1}{2}", -3.5),
    (r"3\frac{\pi}{2}", 3 * math.pi / 2),
    (r"2^{10}\pi", 1024 * math.pi),
    (r"2^{\frac{1}{2}}", math.sqrt(2)),
    (r"2^{1/2}", math.sqrt(2)),
    (r"\pi/6", math.pi / 6),
    (r"4 \cdot 3 \times 2*1", 24.0),
    (r"8/4/2", 1.0),
    (r"2(3)", 6.0),
    (r".5+1.25", 1.75),
    (r"1-\frac{1}{\sqrt{2}}", 1 - 1 / math.sqrt(2)),
]
UNREADABLE = [
    "e", "i", "1,000", "C", "x_1", "x'", "5!", r"\log 2", r"\sin 1", "1/2\\pi", "2^10", "2 3",
    r"\pi 2", "(1", "1)", "", "[1]", r"\frac12", r"\sqrt2", r"3\frac{1}{2}\pi", r"3\frac{1}{2}^{2}", "2*-1", r"1\pm2",
    r"\frac{1}{0}", r"\sqrt{-1}", "0^{-1}", "9^{9^{9^{9}}}", r"\sqrt{2}-\sqrt{2}",
    r"\sqrt{10^{60}+1}-10^{30}", "5%", "1=1",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values(text, value):
    # Digits after the fifteenth are not those of the float, but 1e-12 is the tolerance.
    assert not surely_differ(text, f"{value:.20f}")
    assert surely_differ(text, f"{value * (1 + 1e-10):.20f}")


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_has_no_single_reading_is_left_to_sympy(text):
    assert not surely_differ(text, "123456")
    assert not surely_differ("123456", text)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("x^2-1", "(x-1)(x+1)"),
        ("x+y", "y+x"),
        (r"\frac{x+1}{2}", r"\frac{1}{2}(1+x)"),
        (r"2^{n+1}", r"2 \cdot 2^{n}"),
        ("x", r"\sqrt{x^{2}}"),  # differ below 0: sympy looks there
        (r"\theta \pi", r"\pi \theta"),
        ("C+1", "c+2"),  # not read
        ("x_1", "x_2"),
        ("e^{x}", "e^{2x}"),
    ],
)
def test_expressions_that_sympy_has_to_see(left, right):
    assert not surely_differ(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("x^2-1", "x^2+1"),
        ("x", "y"),
        ("x", "-x"),
        ("2x", "2"),
        (r"\frac{x}{y}", r"\frac{y}{x}"),
        (r"2^{n+1}", r"2^{n}+1"),
        (r"\frac{x^{2}}{2}", r"\frac{x^{3}}{2}"),
        (r"\alpha", r"\beta"),
    ],
)
def test_expressions_that_differ(left, right):
    assert surely_differ(left, right)


def test_large_numbers_cost_nothing():
    started = time.thread_time()
    for text in ("9^{9999}", "1.0000001^{999999}", r"\sqrt[9999]{3}^{99}", "9^{9^{9^{9}}}"):
        surely_differ(text, r"\sqrt{2}")
    assert time.thread_time() - started < 0.05
