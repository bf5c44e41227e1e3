r"""Write the quickstart's data: chains of additions and subtractions with a worked solution.

    python examples/quickstart/make_problems.py --output examples/quickstart/data

One row of train.jsonl or heldout.jsonl, at level 2 (two operations):

    {"prompt":"7+5-3?","response":"7+5=12,12-3=9\\boxed{9}","answer":"9","level":2}

Answers are right everywhere, and so are the worked solutions of heldout.jsonl. The solutions of
train.jsonl come from somebody who is often in a hurry: the longer the problem, the more often there
is no working but only a guess, right one time in seven. Worked ones slip now and then. A model that
imitates this to perfection leaves supervised fine-tuning with groups of every kind, and with
something that only the verifiable reward can teach it: that working the steps pays.

Every partial result lies in 0..59 (0..99 after slips). The same seed gives the same bytes on every
machine. No held-out prompt is in the training file; training prompts may repeat, since level 1 has
only about 300.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_TRAIN = 12_000
NUM_HELDOUT = 200
MAX_LEVEL = 5
MAX_FIRST = 19
MAX_OPERAND = 9
MAX_RESULT = 59
MAX_NUMBER = 99  # the largest that is one token
HASTE = (0.2, 0.4, 0.6, 0.75, 0.85)  # share of guesses among training solutions, by level
LUCK = 0.15  # a guess is right
CARELESSNESS = 0.03  # a worked step is wrong
SLIPS = (-3, -2, -1, 1, 2, 3)


@dataclass(frozen=True)
class Problem:
    prompt: str
    response: str
    answer: str
    level: int  # number of operations

    def to_json(self) -> str:
        return json.dumps(vars(self), separators=(",", ":")) + "\n"


def _draw(rng: random.Random, low: int, high: int) -> int:
    # Only random() is promised to give the same sequence in every Python version.
    return low + int(rng.random() * (high - low + 1))


def draw_problem(rng: random.Random, level: int, *, is_exemplary: bool) -> Problem:
    """A chain of `level` operations; an operation that would leave 0..59 is drawn again."""
    first = value = _draw(rng, 1, MAX_FIRST)
    terms: list[int] = []
    while len(terms) < level:
        term = _draw(rng, 1, MAX_OPERAND) * (1, -1)[_draw(rng, 0, 1)]
        if 0 <= value + term <= MAX_RESULT:
            terms.append(term)
            value += term
    prompt = f"{first}" + "".join(f"{term:+d}" for term in terms) + "?"
    if is_exemplary:
        response = _work(rng, first, terms, carelessness=0.0)
    elif rng.random() < HASTE[level - 1]:
        response = _boxed(value if rng.random() < LUCK else _slip(rng, value))
    else:
        response = _work(rng, first, terms, CARELESSNESS)
    return Problem(prompt=prompt, response=response, answer=str(value), level=level)


def _work(rng: random.Random, value: int, terms: Sequence[int], carelessness: float) -> str:
    """A worked solution; after a slip the chain goes on from the wrong number."""
    steps = []
    for term in terms:
        result = value + term
        if result < 0 or rng.random() < carelessness:
            result = _slip(rng, result)
        steps.append(f"{value}{term:+d}={result}")
        value = result
    return ",".join(steps) + _boxed(value)


def _slip(rng: random.Random, number: int) -> int:
    """Another number nearby that is one token."""
    while True:
        slipped = number + SLIPS[_draw(rng, 0, len(SLIPS) - 1)]
        if 0 <= slipped <= MAX_NUMBER:
            return slipped
        number = max(0, min(MAX_NUMBER, number))


def _boxed(number: int) -> str:
    return f"\\boxed{{{number}}}"


def draw_problems(num_train: int, num_heldout: int, seed: int) -> tuple[list[Problem], ...]:
    """(train, heldout), the levels taking turns in both."""
    rng = random.Random(seed)
    heldout: dict[str, Problem] = {}
    while len(heldout) < num_heldout:
        problem = draw_problem(rng, 1 + len(heldout) % MAX_LEVEL, is_exemplary=True)
        heldout.setdefault(problem.prompt, problem)
    train: list[Problem] = []
    while len(train) < num_train:
        problem = draw_problem(rng, 1 + len(train) % MAX_LEVEL, is_exemplary=False)
        if problem.prompt not in heldout:
            train.append(problem)
    return train, list(heldout.values())


def write(directory: Path, num_train: int, num_heldout: int, seed: int) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / "train.jsonl", directory / "heldout.jsonl"]
    for path, rows in zip(paths, draw_problems(num_train, num_heldout, seed), strict=True):
        # Bytes, so that no platform turns \n into \r\n.
        path.write_bytes("".join(row.to_json() for row in rows).encode())
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--train", type=int, default=NUM_TRAIN, help="rows of train.jsonl")
    parser.add_argument("--heldout", type=int, default=NUM_HELDOUT, help="rows of heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in write(arguments.output, arguments.train, arguments.heldout, arguments.seed):
        sys.stdout.write(f"{path}: {path.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
