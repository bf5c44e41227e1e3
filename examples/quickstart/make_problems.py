r"""Write the quickstart's data: chains of additions and subtractions with a worked solution.

    python examples/quickstart/make_problems.py --output examples/quickstart/data

One row of train.jsonl or heldout.jsonl, at level 2 (two operations):

    {"prompt":"7+5-3?","response":"7+5=12,12-3=9\\boxed{9}","answer":"9","level":2}

Every partial result lies in 0..59. The same seed gives the same bytes on every machine. No held-out
prompt is in the training file; training prompts may repeat, since level 1 has only about 300.
"""

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

NUM_TRAIN = 12_000
NUM_HELDOUT = 200
MAX_LEVEL = 5
MAX_FIRST = 19
MAX_OPERAND = 9
MAX_RESULT = 59


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


def draw_problem(rng: random.Random, level: int) -> Problem:
    """A chain of `level` operations; an operation that would leave 0..59 is drawn again."""
    value = _draw(rng, 1, MAX_FIRST)
    prompt, steps = str(value), []
    while len(steps) < level:
        sign, operand = "+-"[_draw(rng, 0, 1)], _draw(rng, 1, MAX_OPERAND)
        result = value + operand if sign == "+" else value - operand
        if 0 <= result <= MAX_RESULT:
            prompt += f"{sign}{operand}"
            steps.append(f"{value}{sign}{operand}={result}")
            value = result
    response = ",".join(steps) + f"\\boxed{{{value}}}"
    return Problem(prompt=f"{prompt}?", response=response, answer=str(value), level=level)


def draw_problems(num_train: int, num_heldout: int, seed: int) -> tuple[list[Problem], ...]:
    """(train, heldout), the levels taking turns in both."""
    rng = random.Random(seed)
    heldout: dict[str, Problem] = {}
    while len(heldout) < num_heldout:
        problem = draw_problem(rng, level=1 + len(heldout) % MAX_LEVEL)
        heldout.setdefault(problem.prompt, problem)
    train: list[Problem] = []
    while len(train) < num_train:
        problem = draw_problem(rng, level=1 + len(train) % MAX_LEVEL)
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
