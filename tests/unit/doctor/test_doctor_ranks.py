"""The all-reduce of real ranks, and of ranks that bring or do something wrong."""

from pathlib import Path

import pytest

from megatron_rl.doctor.ranks import GLOO_REMEDY, check_all_reduce, reduce_on_rank

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")


def wrong_on_one_rank(rank, world_size, folder):
    reduce_on_rank(rank, world_size, folder)
    if rank == 1:
        Path(folder, "total-1").write_text("4.0")


def fails_on_one_rank(rank, world_size, folder):
    if rank == 1:
        raise RuntimeError("no such interface")


def test_two_ranks_add_up():
    result = check_all_reduce()
    assert result.outcome == "ok"
    assert result.found.startswith("2 ranks over shared memory: right, ")


def test_a_sum_that_is_wrong_on_one_rank():
    result = check_all_reduce(wrong_on_one_rank)
    assert (result.outcome, result.remedy) == ("failed", GLOO_REMEDY)
    assert result.found == "2 ranks over shared memory: the sum is 3.0, 4.0 and should be 3.0"


def test_a_rank_that_fails():
    result = check_all_reduce(fails_on_one_rank)
    assert (result.outcome, result.remedy) == ("failed", GLOO_REMEDY)
    assert result.found == "2 ranks over shared memory: RuntimeError: no such interface"
