"""Published problems as (gold answer, right response) pairs.

The files are the published ones. Where a worked solution ends in a box it is the response, and the
gold stands in another field: a test of the grader. Where there is no such box the gold itself is
boxed, which tests no more than that it can be read.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.reward.extract import last_box
from megatron_rl.reward.gold import with_percent_sign

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One problem: what is right, and a response that says so."""

    where: str  # file and line, from 1
    gold: str
    response: str
    is_solution: bool  # the response is the published worked solution


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A file, and how its rows become golds and right responses."""

    name: str
    file: str
    response_is: str  # for people to read
    gold: Callable[[Row], str]
    solution: Callable[[Row], str] = lambda row: ""
    boxed: Callable[[Row], str] | None = None  # what to box where no solution has a box


def load_cases(benchmark: Benchmark, folder: Path) -> list[Case]:
    """Every problem of a benchmark, in the order of its file."""
    return list(_cases(benchmark, folder / benchmark.file))


def _cases(benchmark: Benchmark, path: Path) -> Iterator[Case]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        gold, solution = benchmark.gold(row), benchmark.solution(row)
        is_solution = last_box(solution) is not None
        boxed = (benchmark.boxed or benchmark.gold)(row)
        response = solution if is_solution else f"The answer is $\\boxed{{{boxed}}}$."
        yield Case(f"{benchmark.file}:{number}", gold, response, is_solution)


def _math500_gold(row: Row) -> str:
    return with_percent_sign(row["question"], row["answer"].split("The answer is:")[1].strip())


def _olympiad_gold(row: Row) -> str:
    return ", ".join(answer.strip() for answer in row["final_answer"])


def _gsm8k_gold(row: Row) -> str:
    return str(row["answer"].split("####")[1].strip())


BENCHMARKS = (
    Benchmark(
        "MATH-500",
        "math500.jsonl",
        "worked solution; the gold is what follows it",
        _math500_gold,
        solution=lambda row: row["answer"].split("The answer is:")[0],
    ),
    Benchmark(
        "Minerva Math",
        "minerva_math.jsonl",
        "worked solution; the gold is its own box",
        lambda row: last_box(row["solution"]) or "",
        solution=lambda row: row["solution"],
    ),
    Benchmark(
        "OlympiadBench",
        "olympiadbench.jsonl",
        "`final_answer` boxed: the solutions have no box",
        _olympiad_gold,
    ),
    Benchmark("GSM8K test", "gsm8k_test.jsonl", "the `####` line boxed", _gsm8k_gold),
    Benchmark("GSM8K train", "gsm8k_train.jsonl", "the `####` line boxed", _gsm8k_gold),
    Benchmark(
        "AIME 2024",
        "aime24.jsonl",
        "worked solution; one has no box, its answer is boxed",
        lambda row: str(row["answer"]),
        solution=lambda row: row["solution"],
    ),
    Benchmark(
        "AMC 2023",
        "amc23.jsonl",
        "`27` boxed for the gold `27.0`: there are no solutions",
        lambda row: str(row["answer"]),
        boxed=lambda row: f"{row['answer']:.0f}",
    ),
)
