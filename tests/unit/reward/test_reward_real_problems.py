"""A sample of the grading table (benchmarks/grading_table.py) with its goals as assertions."""

import os
import sys
from pathlib import Path

import pytest
from reward_helpers import time_limit

from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.gold import check_gold
from megatron_rl.reward.scorer import RewardScorer

ROOT = Path(__file__).parents[3]
DATA = Path(os.environ.get("MEGATRON_RL_DATA", ROOT.parent / "shared" / "data"))
STEP = {"GSM8K train": 50, "GSM8K test": 25, "AIME 2024": 1, "AMC 2023": 1}  # else every 10th

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(),
    reason=f"no published problems in {DATA}; MEGATRON_RL_DATA names their folder",
)


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import grading_table

    yield grading_table
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def scorer():
    scorer = RewardScorer(RewardConfig(deadline_s=10.0))
    yield scorer
    scorer.close()


def test_published_problems_reach_the_goals(table, scorer):
    missed = {}
    for benchmark in table.BENCHMARKS:
        cases = table.load_cases(benchmark, DATA)[:: STEP.get(benchmark.name, 10)]
        trials = list(table.make_trials(cases, others=2, seed=1))
        with time_limit(300):
            missed[benchmark.name] = table.missed_goals(table.grade_trials(trials, scorer))
    assert missed == {benchmark.name: [] for benchmark in table.BENCHMARKS}


def test_every_gold_passes_its_self_check(table):
    cases = [case for benchmark in table.BENCHMARKS for case in table.load_cases(benchmark, DATA)]
    assert len(cases) == 500 + 272 + 675 + 1319 + 7473 + 30 + 40
    assert [case for case in cases if check_gold(case.gold) is not None] == []


def test_solutions_are_used_where_they_have_a_box(table):
    solutions = {
        benchmark.name: sum(case.is_solution for case in table.load_cases(benchmark, DATA))
        for benchmark in table.BENCHMARKS
    }
    assert {name: number for name, number in solutions.items() if number} == {
        "MATH-500": 500,
        "Minerva Math": 272,
        "AIME 2024": 29,
    }
