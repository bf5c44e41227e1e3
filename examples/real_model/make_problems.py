r"""Write the problems: one-step word problems, and the shortest ones of a prepared GSM8K.

    python examples/real_model/make_problems.py --output DIR
    python examples/real_model/make_problems.py --output DIR --gsm8k data/gsm8k_test.jsonl

The first writes train.jsonl and heldout.jsonl: sums and differences of numbers from 2 to 9 in a
sentence or two, which a small model gets right now and then. One row:

    {"prompt":"Nora has 3 plums and buys 4 more. How many plums does Nora have now?",
     "answer":"7","expression":"3+4"}

What is held out is held out whole. A family of facts is two numbers and their sum (3 + 4 = 7,
4 + 3 = 7, 7 - 3 = 4, 7 - 4 = 3). Every family is in one of the two files only, and so is every name
and every thing that is counted; the wordings are shared. No prompt stands twice in a file. The same
seed gives the same bytes on every machine.

The second writes gsm8k_short.jsonl: the rows of a file of `megatron-rl prepare` whose problems have
the fewest characters, in the order of the file.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

NUM_TRAIN = 3000
NUM_HELDOUT = 300
NUM_GSM8K = 64
SMALLEST, LARGEST = 2, 9
HELDOUT_FAMILIES = 12  # of 36

TRAIN_NAMES = (
    *("Nora", "Felix", "Iris", "Hugo", "Clara", "Oscar", "Vera", "Simon", "Alma", "Jonas", "Edith"),
    *("Milo", "Greta", "Ralph", "Dora", "Victor"),
)
HELDOUT_NAMES = ("Linus", "Petra", "Arthur", "Olga", "Bruno", "Selma", "Karl", "Ingrid")
TRAIN_THINGS = (
    *("plums", "stamps", "buttons", "candles", "pears", "ribbons", "postcards", "walnuts"),
    *("whistles", "tulips", "lemons", "erasers"),
)
HELDOUT_THINGS = ("oranges", "pencils", "keys", "tickets", "spoons", "roses")

SUMS = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
    "{name} picked {a} {things} in the morning and {b} {things} in the evening. How many {things} "
    "did {name} pick in total?",
    "There are {a} {things} in a drawer and {b} {things} on a shelf. How many {things} are there "
    "altogether?",
    "A bag holds {a} {things}. {name} puts {b} more into it. How many {things} are in the bag now?",
    "{name} had {a} {things} and got {b} as a present. How many {things} does {name} have now?",
    "On Friday {name} sold {a} {things}, on Saturday {b}. How many {things} were sold altogether?",
)
DIFFERENCES = (
    "{name} had {a} {things} and lost {b} of them. How many {things} does {name} still have?",
    "There were {a} {things} in a basket. {name} took out {b}. How many {things} remain in the "
    "basket?",
    "{name} needs {a} {things} and already has {b}. How many more {things} does {name} need?",
    "A shop had {a} {things} and sold {b}. How many {things} are left?",
    "{name} bought {a} {things} and gave {b} to a friend. How many {things} does {name} still "
    "have?",
    "Of {a} {things} that {name} owns, {b} are broken. How many {things} are not broken?",
)


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    expression: str  # what is to be worked out

    def to_json(self) -> str:
        return json.dumps(vars(self), separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Supply:
    """What the problems of one file are made of."""

    families: Sequence[tuple[int, int]]  # two numbers, the smaller one first
    names: Sequence[str]
    things: Sequence[str]

    def draw(self, rng: random.Random) -> Problem:
        """A problem; sums and differences, and both orders of a family, have even chances."""
        one, other = _pick(rng, self.families)
        if rng.random() < 0.5:
            one, other = other, one
        is_sum = rng.random() < 0.5
        a, b = (one, other) if is_sum else (one + other, other)
        text = _pick(rng, SUMS if is_sum else DIFFERENCES)
        return Problem(
            prompt=text.format(
                name=_pick(rng, self.names), things=_pick(rng, self.things), a=a, b=b
            ),
            answer=str(a + b if is_sum else a - b),
            expression=f"{a}+{b}" if is_sum else f"{a}-{b}",
        )

    def draw_many(self, rng: random.Random, count: int) -> list[Problem]:
        """As many problems, no two with the same prompt."""
        drawn: dict[str, Problem] = {}
        while len(drawn) < count:
            problem = self.draw(rng)
            drawn.setdefault(problem.prompt, problem)
        return list(drawn.values())


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    # Only random() is promised to give the same sequence in every Python version.
    return items[int(rng.random() * len(items))]


def split_families(rng: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(train, held-out): every two numbers from SMALLEST to LARGEST are in one of them."""
    numbers = range(SMALLEST, LARGEST + 1)
    train = [(small, large) for small in numbers for large in numbers if small <= large]
    heldout: list[tuple[int, int]] = []
    while len(heldout) < HELDOUT_FAMILIES:
        heldout.append(train.pop(int(rng.random() * len(train))))
    return train, sorted(heldout)


def draw_problems(
    num_train: int, num_heldout: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out)."""
    rng = random.Random(seed)
    train, heldout = split_families(rng)
    asked = Supply(heldout, HELDOUT_NAMES, HELDOUT_THINGS).draw_many(rng, num_heldout)
    return Supply(train, TRAIN_NAMES, TRAIN_THINGS).draw_many(rng, num_train), asked


def shortest(file: Path, count: int) -> str:
    """The lines of a JSONL file with the shortest prompts; of equals, those that come first."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    sizes = [len(json.loads(line)["prompt"]) for line in lines]
    chosen = sorted(sorted(range(len(lines)), key=lambda number: sizes[number])[:count])
    return "".join(lines[number] for number in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--train", type=int, default=NUM_TRAIN, help="rows of train.jsonl")
    parser.add_argument("--heldout", type=int, default=NUM_HELDOUT, help="rows of heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gsm8k", type=Path, metavar="FILE", help="as `megatron-rl prepare` wrote")
    parser.add_argument("--shortest", type=int, default=NUM_GSM8K, help="its shortest so many")
    options = parser.parse_args()
    if options.gsm8k:
        files = {"gsm8k_short": shortest(options.gsm8k, options.shortest)}
    else:
        drawn = draw_problems(options.train, options.heldout, options.seed)
        files = {
            name: "".join(problem.to_json() for problem in problems)
            for name, problems in zip(("train", "heldout"), drawn, strict=True)
        }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = options.output / f"{name}.jsonl"
        path.write_bytes(text.encode())  # so that no platform turns \n into \r\n
        sys.stdout.write(f"{path}: {text.count(chr(10)):,} problems\n")


if __name__ == "__main__":
    main()
