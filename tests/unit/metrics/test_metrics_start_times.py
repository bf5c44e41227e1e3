"""The parts of a start, by a clock that is set."""

import subprocess
import sys
import time

import pytest

from megatron_rl.metrics import start_times
from megatron_rl.metrics.start_times import StartTimes, seconds_since_start


def test_each_part_lasts_from_the_end_of_the_one_before(monkeypatch):
    slowest = []

    def over_ranks(values, _):
        slowest.append(values)
        return [2 * value for value in values]  # another rank takes twice as long

    monkeypatch.setattr(start_times, "max_over", over_ranks)
    clock = iter([5.0, 6.5, 9.5, 10.0])
    times = StartTimes(lambda: next(clock))
    for part in ("imports", "inputs", "imports", "model"):
        times.end(part)
    assert times.line(None) == (
        "start-up: 20.0 s on the slowest rank: imports 16.0, inputs 3.0, model 1.0"
    )
    assert slowest == [[8.0, 1.5, 0.5, 10.0]]


def test_a_process_knows_when_it_began():
    program = (
        "import time; from megatron_rl.metrics.start_times import seconds_since_start;"
        "a = seconds_since_start(); time.sleep(0.5); print(a, seconds_since_start())"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    lasted = time.monotonic() - begun
    first, second = map(float, done.stdout.split())
    assert 0.0 < first < lasted
    assert second - first == pytest.approx(0.5, abs=0.4)


def test_a_system_that_does_not_say_is_taken_to_begin_now(tmp_path):
    assert seconds_since_start(tmp_path / "stat") == 0.0
