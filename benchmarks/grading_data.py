"""Published problems as (gold answer, right response) pairs.

The files are the published ones (README of the folder says whose). Where a worked solution ends in
a box it is the response, and what it is compared with comes from another place of the file: a test
of the grader. Where there is no such box, the answer itself is boxed: a test of parsing only.
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
    is_solution: bool  # the response is the published worked solution, not the gold in a box


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A file, and how its rows become cases."""

    name: str
    file: str
    to_case: Callable[[Row], tuple[str, str | None]]  # gold, worked solution or None
    gold_is_own_box: bool = False  # there is no answer but the box of the solution


def load_cases(benchmark: Benchmark, folder: Path) -> list[Case]:
    """Every problem of a benchmark, in the order of its file."""
    return list(_cases(benchmark, folder / benchmark.file))


def _cases(benchmark: Benchmark, path: Path) -> Iterator[Case]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        gold, solution = benchmark.to_case(json.loads(line))
        has_box = solution is not None and last_box(solution) is not None
        response = solution if has_box and solution else f"The answer is $\\boxed{{{gold}}}$."
        yield Case(f"{benchmark.file}:{number}", gold, response, has_box)


def _math500(row: Row) -> tuple[str, str]:
    solution, answer = row["answer"].split("The answer is:")
    return with_percent_sign(row["question"], answer.strip()), solution


def _minerva(row: Row) -> tuple[str, str]:
    return last_box(row["solution"]) or "", row["solution"]


def _olympiad(row: Row) -> tuple[str, None]:
    return ", ".join(answer.strip() for answer in row["final_answer"]), None


def _gsm8k(row: Row) -> tuple[str, None]:
    return row["answer"].split("####")[1].strip(), None


def _aime(row: Row) -> tuple[str, str]:
    return str(row["answer"]), row["solution"]


def _amc(row: Row) -> tuple[str, str]:
    return str(row["answer"]), f"The answer is \\boxed{{{row['answer']:.0f}}}."


BENCHMARKS = (
    Benchmark("MATH-500", "math500.jsonl", _math500),
    Benchmark("Minerva Math", "minerva_math.jsonl", _minerva, gold_is_own_box=True),
    Benchmark("OlympiadBench", "olympiadbench.jsonl", _olympiad),
    Benchmark("GSM8K test", "gsm8k_test.jsonl", _gsm8k),
    Benchmark("GSM8K train", "gsm8k_train.jsonl", _gsm8k),
    Benchmark("AIME 2024", "aime24.jsonl", _aime),
    Benchmark("AMC 2023", "amc23.jsonl", _amc),
)
