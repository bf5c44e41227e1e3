"""A rank that hangs, fails or dies is named, and ends the whole job within seconds."""

import pytest
from training_runs import PP2, TP2

from megatron_rl.errors import END_FILE

pytestmark = pytest.mark.slow

MIN_S = 5.0
SETTINGS = (
    f"watchdog.min_s={MIN_S}",
    "watchdog.factor=1",
    "checkpoint.save_every=1",
    "run.num_iterations=30",
)
SAMPLED = (  # by one engine of both ranks, which spin while they wait for each other
    *TP2,
    "rollout.engine=vllm",
    "rollout.tensor_model_parallel_size=2",
    "algorithm.preset=reinforce_rej",
    "rollout.group_size=4",
    "rollout.max_response_tokens=12",
    "reward.kind=coin_reward:is_even",
    "reward.num_workers=1",
)
HANGS = {  # what the message says of the place
    ("sleeps", "update", TP2): "faulty_train.py",
    ("computes", "rollout", ()): "faulty_train.py",
    ("is_stopped", "checkpoint", PP2): "was stopped by a signal",
    ("sleeps", "engine step", SAMPLED): "faulty_train.py",
}
FAILURES = {
    ("raises", "checkpoint", TP2): "KeyError: 'a row that is not there'",
    ("raises", "update", PP2): "KeyError: 'a row that is not there'",
    ("is_killed", "rollout", TP2): "is gone: it was killed",
    ("raises", "engine step", SAMPLED): "KeyError: 'a row that is not there'",
}


# A step of an engine stands in the rollout, and what is said is the same of every phase.
EXHAUSTIVE = {
    ("sleeps", "update", TP2),
    ("raises", "checkpoint", TP2),
    ("raises", "engine step", SAMPLED),
}


def of_faults(faults):
    params = [
        pytest.param(*fault, marks=pytest.mark.exhaustive if fault in EXHAUSTIVE else ())
        for fault in faults
    ]
    ids = [f"{fault}-{place}" for fault, place, _ in faults]
    return pytest.mark.parametrize(("fault", "place", "layout"), params, ids=ids)


@pytest.fixture
def noted(monkeypatch, tmp_path):
    """Where ranks say how they end, for the script that starts torchrun."""
    monkeypatch.setenv(END_FILE, str(tmp_path / "end"))
    return tmp_path / "end"


def phase_of(place):
    return "rollout" if place == "engine step" else place


@of_faults(HANGS)
def test_a_rank_that_stands_still_is_named_with_its_stack(runs, noted, fault, place, layout):
    name = f"{fault} {place}"
    code, said, seconds = runs.train_with_fault(fault, place, name, *SETTINGS, *layout)
    assert code == 1, said
    assert noted.read_text() == "75\n"
    assert said.count("megatron-rl: error: ") == 1, said
    assert f"iteration 3, {phase_of(place)} (deadline 5 s" in said
    (line,) = [line for line in said.splitlines() if line.startswith("  stuck: ")]
    assert line.startswith("  stuck: rank 1, process ")
    _, _, stacks = said.partition("  stack of rank 1, innermost last:\n")
    assert HANGS[fault, place, layout] in stacks.partition("  stack of rank 0")[0], said
    assert "waiting for it: ranks 0" in said
    # torchrun itself takes some of it.
    assert seconds < MIN_S + 10 + 5


@of_faults(FAILURES)
def test_a_rank_that_fails_ends_all_with_its_own_words(runs, noted, fault, place, layout):
    name = f"{fault} {place}"
    code, said, seconds = runs.train_with_fault(fault, place, name, *SETTINGS, *layout)
    assert code == 1, said
    assert noted.read_text() == "1\n"
    assert said.count("megatron-rl: error: ") == 1, said
    assert FAILURES[fault, place, layout] in said
    assert f"iteration 3, {phase_of(place)}" in said
    assert "Connection closed by peer" not in said
    assert seconds < 10
