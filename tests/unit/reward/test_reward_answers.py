"""Verdicts by hand, after the policy for ambiguous answers.

Every pair goes the whole way: box, exact layers, and a worker where those leave it open.
"""

import re

import pytest
from reward_helpers import time_limit

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.math_grader import grade
from megatron_rl.reward.scorer import RewardScorer

CORRECT = [
    # fractions and decimals
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"\frac{1}{2}", "0.5"),
    ("0.5", ".5"),
    ("0.5", "0.50"),
    ("0.5", r"\frac12"),
    ("0.5", "\u00bd"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"-\frac{3}{4}", r"\frac{3}{-4}"),
    (r"3\frac{1}{2}", r"\frac{7}{2}"),
    (r"3\frac{1}{2}", "3.5"),
    ("3.5", "3\u00bd"),
    (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"\frac{1}{6}", r"0.1\overline{6}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("27.0", "27"),
    # integers and powers
    ("1000", "1,000"),
    ("1000", "1{,}000"),
    ("1000", r"1\,000"),
    ("1000", r"1,\!000"),
    ("1000", "10^3"),
    ("1000", r"1\times10^3"),
    (r"900,\!000,\!000", "900000000"),
    ("12000", r"1.2 \times 10^{4}"),
    ("0.001", "10^{-3}"),
    ("1024", "2^{10}"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("-5", "\u22125"),
    ("5", "+5"),
    ("073", "73"),
    ("073", r"\textbf{(073)}"),
    ("42", "(42)"),
    ("4", "\uff14"),
    ("4", "4."),
    ("4", r"\text{4}"),
    # percent, money, units
    (r"50\%", "50"),
    (r"50\%", r"\frac12"),
    (r"50\%", "0.5"),
    (r"50\%", r"50 \text{ percent}"),
    ("0.5", r"50\%"),
    (r"16\frac{2}{3}\%", r"\frac{50}{3}"),
    ("18.90", r"\$18.9"),
    (r"\$32,\!348", "32348"),
    (r"5\text{ cm}", "5"),
    ("5", r"5\text{ cm}"),
    (r"5\text{ cm}", r"5\text{ centimeters}"),
    (r"5\text{ cm}", "5 cm"),
    (r"5\text{ cm}^2", r"5\text{ square cm}"),
    ("10", r"10\text{ miles per hour}"),
    (r"3\text{ ways}", r"3\text{ possible ways}"),
    ("90", r"90^\circ"),
    (r"90^{\circ}", r"90\text{ degrees}"),
    (r"2\sqrt{3}", r"2\sqrt3\text{ cm}"),
    ("5000000", r"5\text{ million}"),
    # roots, identities, expressions
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"2\sqrt{3}", "2*sqrt(3)"),
    (r"\sqrt{2}", "\u221a2"),
    ("x^2-1", "(x-1)(x+1)"),
    ("x+y", "y+x"),
    ("x^2", "x\u00b2"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\binom{5}{2}", "10"),
    ("5!", "120"),
    (r"\frac{\pi}{6}", r"\dfrac16\pi"),
    # names and relations
    ("5", "x=5"),
    ("x=5", "5"),
    ("x=5", "x = 5"),
    ("x=1, y=2", "y=2, x=1"),
    ("1,2", r"x=1 \text{ or } x=2"),
    ("y=2x+3", "2x+3"),
    ("(2,5)", r"x\in(2,5)"),
    ("[2,5]", r"2\le x\le5"),
    ("x>3", r"(3,\infty)"),
    (r"x\le 3", "x\u22643"),
    (r"k\in\mathbb{Z}", r"k \in \mathbb Z"),
    # sets, tuples, intervals, matrices
    ("1,2", "2,1"),
    ("1,2", r"1\text{ and }2"),
    ("1,2", r"\{2,1\}"),
    (r"\{1,2\}", "1, 2"),
    (r"\{1,2\}", r"\{1,2,2\}"),
    (r"\pm 3", "3,-3"),
    (r"2\pm\sqrt3", r"2+\sqrt3, 2-\sqrt3"),
    ("(1,2)", r"\left(1,\,2\right)"),
    ("(1,2),(3,4)", "(3,4), (1,2)"),
    (r"\left[\frac12,\frac34\right]", "[0.5,0.75]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    # words, choices, bases, ratios, times
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{a circle}", r"\text{Circle}"),
    (r"\text{June 20}", r"\text{20 June}"),
    ("(A)", "A"),
    ("(A)", r"\textbf{(A)}\ 5"),
    ("A", r"\text{(A)}"),
    ("4210_5", "4210"),
    ("4210_5", "4210_{5}"),
    ("10", "10_{10}"),
    ("3:4", r"\frac34"),
    ("3:4", "6:8"),
    ("3:30", r"3:30\text{ p.m.}"),
]

WRONG = [
    # accepted by math-verify although different
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"\frac{2^{2005}+1}{3\cdot 2^{2006}}", r"\frac{1}{3\cdot 2^{2006}}"),
    (r"\frac{10^{20}+1}{10^{20}}", "1"),
    ("0.1234567", "0.1234568"),
    ("0.0000001", "0.0000002"),
    (r"\frac13", "0.3333333"),
    (r"\pi", "3.1415927"),
    (r"\pi", "3.14159265358979"),
    (r"\sqrt{2}", "1.414214"),
    ("4", "4=4"),
    ("4", "3=4"),
    ("4", "x=3=4"),
    ("4", "x=y=4"),
    ("5", r"5\%"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("10", "10_5"),
    ("4210_5", "4210_6"),
    ("(1,2)", "1,2"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
    (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
    (r"1:2:3:\ldots", r"1:4:9:\ldots"),
    # policy
    (r"\frac13", "0.333"),
    ("0.5", "50"),
    (r"50\%", "5"),
    (r"\frac\pi6", r"30^\circ"),
    ("1,000", "1, 000"),
    ("(1,2)", r"\{1,2\}"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    (r"\pm 3", "3"),
    (r"2\pm\sqrt3", r"2+\sqrt3"),
    ("[2,5)", "(2,5]"),
    ("[2,5)", "[2,5]"),
    ("[2,5)", "(2,5)"),
    ("x>3", r"x\ge3"),
    ("5", "3=5"),
    ("5", "a=b=5"),
    ("x=5", "y=5"),
    ("x=1, y=2", "x=2, y=1"),
    ("4", "1,2,3,4"),
    ("4", r"3\text{ or }4"),
    ("4", r"\text{3 or 4}"),
    (r"3:30\text{ p.m.}", "3:30"),
    (r"3:30\text{ p.m.}", r"3:30\text{ a.m.}"),
    ("12:00", "1:00"),
    # plainly different
    ("4", "5"),
    ("-5", "5"),
    ("3.14", r"\pi"),
    (r"3\frac{1}{2}", r"\frac{3}{2}"),
    ("2^{100}", "1267650600228229401496703205377"),
    (r"5\text{ cm}", r"5\text{ cm}^2"),
    (r"\$5", r"5\text{ cents}"),
    ("5", r"5\text{ million}"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    ("x^2-1", "x^2+1"),
    ("x+1", "y+1"),
    ("2x", "2y"),
    ("y=2x+3", "y=2x-3"),
    ("4", "x"),
    ("11", "1 1"),
    ("1234", "12,34"),
    (r"\emptyset", "0"),
    (r"\{1,2,3\}", r"\{1,2\}"),
    ("(1,2)", "(1,2,3)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\text{yes}", r"\text{no}"),
    ("1", r"\text{True}"),
    ("A", "a"),
    ("A", "B"),
    ("A", "A, B"),
    ("A", r"A \text{ or } B"),
    ("4", "__import__('os').getpid()"),
    # refused without sympy: nobody asks for these
    ("4", "10000000!"),
    ("4", "((10!)!)!"),
    ("4", "3^{100000000}"),
    ("4", r"\sum_{n=1}^{100000} \sin(n)"),
    ("4", r"\binom{1000000000}{5}"),
    ("4", "7" * 400),
    ("4", "(" * 30 + "4" + ")" * 30),
]

PAIRS = [(*pair, True) for pair in CORRECT] + [(*pair, False) for pair in WRONG]


@pytest.fixture(scope="module")
def scores():
    # A generous deadline: what is tested is the verdict, on however slow a machine.
    scorer = RewardScorer(RewardConfig(deadline_s=10.0))
    for number, (gold, answer, _) in enumerate(PAIRS):
        scorer.submit((number, 0), f"So it is $\\boxed{{{answer}}}$.", gold)
    with time_limit():
        scores = scorer.collect()
    yield scores
    scorer.close()


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda n: f"{PAIRS[n][0]}~{PAIRS[n][1]}")
def test_verdict(scores, number):
    _, answer, is_equal = PAIRS[number]
    score = scores[number, 0]
    assert score.verdict == ("correct" if is_equal else "wrong")
    assert score.extracted == answer


def test_table_is_without_doubles():
    assert len({pair[:2] for pair in PAIRS}) == len(PAIRS)


def test_numbers_need_no_worker():
    # An expression of either side may need sympy; a pair of numbers, lists or words must not.
    by_sympy = re.compile(r"sqrt|pi|\\binom|sin|!|[xy]|cup|matrix|mathrm|__|\^\{2|2\^\{99|mathbb")
    pairs = [pair for pair in PAIRS if not by_sympy.search(pair[0] + pair[1])]
    assert len(pairs) > 90
    to_worker = [pair for pair in pairs if grade(f"\\boxed{{{pair[1]}}}", pair[0]).pair]
    assert to_worker == []


@pytest.mark.parametrize(
    "text",
    ["\x00", "\ud800", "\u202e4", "\\", "{", "}{", "$$", "\\\\", "^", "_", "=", "%", "\\$", ","],
)
@pytest.mark.parametrize("gold", ["4", "(1,2)", r"\text{yes}", "x=5", "3:4", r"50\%"])
def test_odd_text_never_raises(text, gold):
    for answer in (text, text * 100, f"4{text}", f"{text}4"):
        assert grade(f"\\boxed{{{answer}}}", gold) is not None
