"""A stop while the run evaluates: it ends soon, and nothing of the evaluation is lost."""

import json

import pytest
from engine_models import QUICKSTART
from training_runs import exported

pytestmark = pytest.mark.slow

BENCHMARK = "evaluation.benchmarks.arithmetic"
SETTINGS = (
    "algorithm.preset=reinforce_rej",
    "rollout.group_size=4",
    "rollout.max_response_tokens=12",
    "rollout.engine=vllm",
    "rollout.tensor_model_parallel_size=2",  # two ranks that must break off at the same step
    "parallel.tensor_model_parallel_size=2",
    "reward.kind=coin_reward:is_even",
    "reward.num_workers=1",
    f"{BENCHMARK}.path={QUICKSTART / 'data' / 'heldout.jsonl'}",
    f"{BENCHMARK}.max_problems=40",
    "evaluation.every=3",
    "evaluation.samples=2",
    "evaluation.max_response_tokens=40",
    "checkpoint.save_every=2",
    "run.num_iterations=4",
)


def test_it_is_made_and_recorded_by_the_next_start(runs):
    name = "stopped in evaluation"
    code, said, _ = runs.train_with_fault("is_told_to_stop", "evaluation", name, *SETTINGS)
    assert code == 0, said
    assert "told to stop: checkpoint saved after iteration 3" in said
    assert [record["iteration"] for record in runs.records(name)] == [1, 2]
    assert not list((runs.folder / name / "evaluation").glob("*_000003*"))
    state = runs.folder / name / "checkpoints" / "iteration_000003" / "state.json"
    assert "policy/loss" in json.loads(state.read_text())["owed_metrics"]

    said = runs.finish(name, 2, *SETTINGS)
    assert "resumed after iteration 3" in said
    runs.finish("evaluated", 2, *SETTINGS)
    expected = runs.records("evaluated")
    assert "evaluation/arithmetic/average_at_2" in expected[2]
    # How much of the weights is verified depends on the start: all, the first time.
    for record in (*expected, *(found := runs.records(name))):
        del record["weights/verified_tensors"]
    assert found == expected
    assert exported(runs.folder / name) == exported(runs.folder / "evaluated")
    last = "evaluation/arithmetic_000003.jsonl"
    assert (runs.folder / name / last).read_bytes() == (
        runs.folder / "evaluated" / last
    ).read_bytes()
