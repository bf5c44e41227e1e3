"""Responses that nobody would write, through the whole mathematics verifier.

    python benchmarks/grading_fuzz.py --responses 100000

Prints how often each verdict came, and the first of every kind of failure. Exit code 1 when an
exception reached a verdict (`error`), or when a response was lost.
"""

import argparse
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.scorer import RewardScorer, Score

PAIRS = Path(__file__).parents[1] / "tests" / "data" / "answer_pairs.yaml"
CHUNK = 2000
_LATEX = r"""
\frac{ \frac \sqrt{ \sqrt[ ^{ _{ { } ( ) [ ] \{ \} | || \left \right \cdot \times \pm \div + - * /
= < > \le \ge \ne \in \cup \cap \mid \log \ln \sin \tan^{-1} \pi \infty \theta \gamma \Delta e i
x y n 0 1 2 9 10 99999 0.5 .5 1,000 1{,}000 3e5 ! !! % \% \$ $ ^\circ , ; : . ... \ldots \dots
\text{ \text{cm} \text{and} \mathrm{ \mathbf{ \boxed{ \boxed \fbox{ & \\ \\[ \, \! ~ ' _ ^ **
\begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases} \sum_{ \int \lim_{ \binom{ \overline{
\lfloor \rceil f(x) A B_5 \mathbb{R} \emptyset <think> </think> <answer> </answer> ####
"""
_ODD = ("\x00", "\x1b[31m", "\u200b", "\u202e", "\ud800", "\u00bd", "\u221a", "\u4e2d", "\uff14")
FRAGMENTS = (*_LATEX.split(), *_ODD, "\U0001f600", " ", "\n")


def make_responses(number: int, seed: int) -> Iterator[tuple[str, str]]:
    """(response, gold) pairs, the same ones for the same seed."""
    rng = random.Random(seed)
    golds, answers = _known_texts()
    makers = (_soup, _repeated, _mutated, _unicode, _nested)
    for _ in range(number):
        answer = rng.choice(makers)(rng, answers)
        frame = rng.choice(("So \\boxed{%s}.", "\\boxed{%s", "%s", "\\boxed{%s}" * 3, "<think>%s"))
        if rng.random() < 0.7:
            frame = "So the answer is $\\boxed{%s}$."
        yield frame.replace("%s", answer), rng.choice(golds)


def _known_texts() -> tuple[list[str], list[str]]:
    table = yaml.safe_load(PAIRS.read_text("utf-8"))
    pairs = [pair for verdicts in table.values() for pairs in verdicts.values() for pair in pairs]
    return [gold for gold, _ in pairs], [answer for _, answer in pairs]


def _soup(rng: random.Random, answers: Sequence[str]) -> str:
    return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 30)))


def repeated(rng: random.Random, length: int = 500) -> str:
    """A few fragments over and over."""
    unit = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(1, 4)))
    return unit * max(1, length // len(unit))


def _repeated(rng: random.Random, answers: Sequence[str]) -> str:
    return repeated(rng, rng.choice((20, 100, 500, 20_000)))


def _mutated(rng: random.Random, answers: Sequence[str]) -> str:
    text = list(rng.choice(answers))
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        text[place : place + rng.randrange(3)] = [rng.choice(FRAGMENTS)]
    return "".join(text)


def _unicode(rng: random.Random, answers: Sequence[str]) -> str:
    return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 40)))


def _nested(rng: random.Random, answers: Sequence[str]) -> str:
    opening, closing = rng.choice(
        [("{", "}"), ("(", ")"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("2^{", "}"), ("[", ")")]
    )
    depth = rng.choice((2, 5, 12, 40, 400))
    return opening * depth + rng.choice(answers) + closing * rng.choice((depth, depth - 1))


def grade_all(responses: Sequence[tuple[str, str]], scorer: RewardScorer) -> list[Score]:
    """Scores in the order of the responses."""
    for number, (response, gold) in enumerate(responses):
        scorer.submit((number, 0), response, gold)
    scores = scorer.collect()
    return [scores[number, 0] for number in range(len(responses))]


def main() -> None:
    """Fuzz and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    scorer = RewardScorer(RewardConfig())
    verdicts: Counter[str] = Counter()
    reasons: dict[str, tuple[str, str]] = {}
    started, slowest = time.monotonic(), 0.0
    for start in range(0, args.responses, CHUNK):
        chunk = list(make_responses(min(CHUNK, args.responses - start), args.seed + start))
        for case, score in zip(chunk, grade_all(chunk, scorer), strict=True):
            verdicts[str(score.verdict)] += 1
            slowest = max(slowest, score.seconds)
            if score.has_failed:
                reasons.setdefault(re.sub(r"[0-9.]+", "N", score.reason or ""), case)
        print(f"{start + len(chunk)}: {dict(verdicts)}", flush=True)
    scorer.close()
    seconds = time.monotonic() - started
    print(f"{args.responses} responses in {seconds:.0f} s, the slowest took {slowest:.2f} s of CPU")
    for reason, (response, gold) in reasons.items():
        print(f"  {reason}: response {ascii(response)[:200]}, gold {gold!a}")
    sys.exit(verdicts["error"] > 0 or verdicts.total() != args.responses)


if __name__ == "__main__":
    main()
