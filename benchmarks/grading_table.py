"""The mathematics verifier on published problems: what it should accept, and what it should not.

    python benchmarks/grading_table.py --data ../shared/data --output benchmarks/results/grading.md

Every case goes the whole way: extraction, exact layers, and a worker where those leave it open.
Exit code 1 when a rate misses its goal.
"""

import argparse
import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from grading_data import BENCHMARKS, Benchmark, Case, load_cases
from grading_respell import disguise, near_miss, respell

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.gold import check_gold
from megatron_rl.reward.math_grader import grade
from megatron_rl.reward.scorer import RewardScorer
from megatron_rl.reward.symbolic import read_pair

PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")
GOALS = {  # smallest share of trials with the verdict they should have
    "right": 0.995,
    "rewritten": 0.995,
    "disguised": 0.98,
    "other problem": 0.999,
    "one digit off": 0.999,
}

HEAD = r"""# Grading, measured

`python benchmarks/grading_table.py --data DIR --output benchmarks/results/grading.md` ({versions})

Verdicts that are as they should be, of all trials, over published problems.

- *right*: a right response, as the second column says;
- *rewritten*: the gold in another spelling of the same value (fractions, thousands, powers of ten,
  brackets, spaces);
- *disguised*: `\frac{{2 \cdot (gold)}}{{2}}`, which only algebra can tell, for golds that are
  expressions;
- *other problem*: the answers of five other problems of the set, which must be wrong; a number that
  both problems share is left out;
- *one digit off*: the gold with one digit changed, which must be wrong;
- *workers*: trials that the exact layers pass on to a worker.

| | right response | right | rewritten | disguised | other problem | one digit off | workers |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """One response to grade, and what the verdict has to be."""

    kind: str
    where: str
    gold: str
    response: str
    answer: str  # for people to read
    is_right: bool


@dataclass(slots=True)
class Tally:
    """What became of the trials of one kind."""

    trials: int = 0
    hits: int = 0
    to_workers: int = 0
    misses: list[tuple[Trial, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.hits / self.trials if self.trials else 1.0


def make_trials(cases: Sequence[Case], others: int, seed: int) -> Iterator[Trial]:
    """All trials of one benchmark; the same ones for the same seed."""
    rng = random.Random(seed)
    for index, case in enumerate(cases):
        yield Trial("right", case.where, case.gold, case.response, case.response[-60:], True)
        written = (
            ("rewritten", respell(case.gold, rng), True),
            ("disguised", disguise(case.gold), True),
            ("one digit off", near_miss(case.gold, rng), False),
            *(("other problem", other, False) for other in _others(cases, index, others, rng)),
        )
        for kind, answer, is_right in written:
            if answer is not None and not (same_number(case.gold, answer) and not is_right):
                response = f"So the answer is $\\boxed{{{answer}}}$."
                yield Trial(kind, case.where, case.gold, response, answer, is_right)


def same_number(left: str, right: str) -> bool:
    """Whether two texts are one plain number: 1200 and 1,200.0."""
    with contextlib.suppress(ValueError):
        return Fraction(left.replace(",", "")) == Fraction(right.replace(",", ""))
    return left.split() == right.split()


def grade_trials(trials: Sequence[Trial], scorer: RewardScorer) -> dict[str, Tally]:
    """Hits and misses by kind."""
    for number, trial in enumerate(trials):
        scorer.submit((number, 0), trial.response, trial.gold)
    scores = scorer.collect()
    tallies = {kind: Tally() for kind in GOALS}
    for number, trial in enumerate(trials):
        score, tally = scores[number, 0], tallies[trial.kind]
        pair = grade(trial.response, trial.gold).pair
        tally.trials += 1
        tally.to_workers += pair is not None
        if str(score.verdict) == ("correct" if trial.is_right else "wrong"):
            tally.hits += 1
            continue
        is_unread = pair is not None and None in read_pair(*pair)
        said = "latex2sympy cannot read it" if is_unread else score.reason or str(score.verdict)
        tally.misses.append((trial, said))
    return tallies


def missed_goals(tallies: dict[str, Tally]) -> list[str]:
    """Kinds of trials whose share of right verdicts is below the goal."""
    return [
        f"{kind}: {tally.share:.2%}" for kind, tally in tallies.items() if tally.share < GOALS[kind]
    ]


def _others(cases: Sequence[Case], index: int, count: int, rng: random.Random) -> list[str]:
    drawn = rng.sample(range(len(cases)), min(count + 1, len(cases)))
    return [cases[other].gold for other in drawn if other != index][:count]


def _table_line(benchmark: Benchmark, tallies: dict[str, Tally]) -> str:
    cells = [f"{tally.hits:,} of {tally.trials:,}" for tally in tallies.values()]
    needed = sum(tally.to_workers for tally in tallies.values())
    return "| " + " | ".join([benchmark.name, benchmark.response_is, *cells, f"{needed:,}"]) + " |"


def _document(lines: list[str], misses: list[str], golds: list[str]) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    found = ["Every miss:", *misses] if misses else ["No misses."]
    unusable = ["Golds that fail the self-check:", *golds]
    found += ["", *(unusable if golds else ["Every gold passes the self-check."]), ""]
    return HEAD.format(versions=versions) + "\n".join([*lines, "", *found])


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--others", type=int, default=5, help="other answers for each problem")
    args = parser.parse_args()
    scorer = RewardScorer(RewardConfig(deadline_s=10.0))
    lines, misses, golds, problems = [], [], [], []
    for benchmark in BENCHMARKS:
        cases = load_cases(benchmark, args.data)
        golds += [f"- `{c.where}`: `{c.gold}`: {why}" for c in cases if (why := check_gold(c.gold))]
        tallies = grade_trials(list(make_trials(cases, args.others, seed=0)), scorer)
        lines.append(_table_line(benchmark, tallies))
        print(lines[-1], flush=True)
        misses += [
            f"- {kind}, `{trial.where}`: gold `{trial.gold}`, answer `{trial.answer}`: {said}"
            for kind, tally in tallies.items()
            for trial, said in tally.misses
        ]
        problems += [f"{benchmark.name}, {problem}" for problem in missed_goals(tallies)]
    scorer.close()
    if args.output:
        args.output.write_text(_document(lines, misses, golds))
    print("\n".join([*misses, *golds, *(f"below the goal: {problem}" for problem in problems)]))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
