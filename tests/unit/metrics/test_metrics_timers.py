import pytest

from megatron_rl.metrics.timers import PhaseTimer


class Clock:
    """Stands still until a test moves it; enough, since the timer only subtracts."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_seconds_of_a_phase_add_up_and_the_iteration_spans_all():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("update"):
        clock.now += 2.0
    clock.now += 0.5  # between phases
    with timer.phase("rollout"):
        clock.now += 4.0
    with timer.phase("update"):
        clock.now += 1.0
    values = timer.take()
    assert values == {"time/rollout_s": 4.0, "time/update_s": 3.0, "time/iteration_s": 7.5}
    assert list(values) == ["time/rollout_s", "time/update_s", "time/iteration_s"]  # loop order


def test_take_starts_the_next_iteration():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("rollout"):
        clock.now += 4.0
    timer.take()
    clock.now += 0.25
    assert timer.take() == {"time/iteration_s": 0.25}


def test_phases_may_overlap():
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("rollout"):
        clock.now += 1.0
        with timer.phase("reward"):
            clock.now += 2.0
    assert timer.take() == {"time/rollout_s": 3.0, "time/reward_s": 2.0, "time/iteration_s": 3.0}


def test_waiting_for_the_device_is_billed_to_the_phase_that_queued_the_work():
    clock = Clock()
    queued = [0.0]

    def synchronize():
        clock.now += queued.pop() if queued else 0.0

    timer = PhaseTimer(clock, synchronize)
    with timer.phase("update"):
        queued.append(5.0)
    assert timer.take()["time/update_s"] == 5.0


def test_a_phase_that_raises_is_billed_too():
    clock = Clock()
    timer = PhaseTimer(clock)

    def fail_after_a_second():
        clock.now += 1.0
        raise KeyError

    with pytest.raises(KeyError), timer.phase("checkpoint"):
        fail_after_a_second()
    assert timer.take()["time/checkpoint_s"] == 1.0


def test_an_unknown_phase_is_named():
    with pytest.raises(ValueError, match="unknown phase 'train': must be one of rollout, reward"):
        PhaseTimer().phase("train").__enter__()
