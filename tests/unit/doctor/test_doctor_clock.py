"""Clocks that agree and clocks that do not, over a store as torchrun has one."""

import threading
import time

import pytest
from torch._C._distributed_c10d import HashStore

from megatron_rl.doctor import clock


def test_one_machine_has_nothing_to_compare(monkeypatch):
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    assert clock.check_clock().found == "one machine"


@pytest.mark.parametrize("shift", [0.0, 7.0, -90.0])
def test_the_difference_is_found_on_both_sides(shift):
    store, told = HashStore(), []
    first = threading.Thread(target=lambda: told.extend(clock.serve(store, 2)))
    first.start()
    ahead = clock.ask(store, 1, now=lambda: time.time() + shift)
    first.join(30)
    # At most half of the quickest way there and back; threads of a busy machine may wait.
    assert ahead == pytest.approx(shift, abs=0.5)
    assert told == [ahead]


@pytest.mark.parametrize(
    ("ahead", "outcome"),
    [([0.01, -0.02], "ok"), ([0.01, -3.0], "warning"), ([100.0, 0.0], "failed")],
)
def test_the_largest_difference_decides(monkeypatch, ahead, outcome):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setattr("megatron_rl.parallel.groups.store_of_this_attempt", lambda _: HashStore())
    monkeypatch.setattr(clock, "serve", lambda store, machines: ahead)
    result = clock.check_clock()
    assert result.outcome == outcome
    assert f"at most {max(map(abs, ahead)):.3f} s apart" in result.found
    assert bool(result.remedy) == (outcome != "ok")


def test_a_machine_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setattr("megatron_rl.parallel.groups.store_of_this_attempt", lambda _: HashStore())
    with pytest.raises(RuntimeError, match=r"(?i)timeout"):
        clock.check_clock(timeout_s=0.2)
