"""Where a process stands, seen from another one."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest

from megatron_rl.parallel import stacks
from megatron_rl.parallel.stacks import Process, look_at

SCRIPT = """
import json, sys, time
from dataclasses import asdict
from megatron_rl.parallel.stacks import this_process
print(json.dumps(asdict(this_process())), flush=True)
def loops_in_c():
    sum(range(10**12))
def sleeps():
    time.sleep(1000)
{"c": loops_in_c, "sleep": sleeps}[sys.argv[1]]()
"""


@pytest.fixture
def started():
    """Start a process that does one thing for ever; gives it and what it says of itself."""
    running = []

    def start(what):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, what], stdout=subprocess.PIPE, text=True
        )
        running.append(process)
        return process, Process(**json.loads(process.stdout.readline()))

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("what", "function"), [("c", "loops_in_c"), ("sleep", "sleeps")])
def test_a_process_that_cannot_answer_shows_its_stack(started, what, function):
    _, place = started(what)
    assert place.is_here
    # It may still be on its way into the function.
    assert any(f"in {function}" in "\n".join(look_at(place)) for _ in range(10))


def test_a_stopped_process_is_called_so(started):
    process, place = started("sleep")
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    assert look_at(place)[0] == f"process {process.pid} was stopped by a signal and does not answer"


def test_a_process_that_has_ended_leaves_no_file(started):
    process, place = started("sleep")
    assert os.path.exists(place.stack_file)
    assert not place.has_ended
    process.kill()
    process.wait()
    assert place.has_ended
    assert not os.path.exists(place.stack_file)
    assert "is gone" in look_at(place)[0]
    assert set(asdict(place)) == {"host", "pid", "stack_file"}


def test_a_main_thread_in_a_collective_is_said_to_wait(monkeypatch):
    lines, is_waiting = stacks.own_stack()
    assert not is_waiting
    assert "in test_a_main_thread_in_a_collective_is_said_to_wait" in "\n".join(lines)
    monkeypatch.setattr(stacks, "WAITING", ("/parallel/test_stacks.py",))
    assert stacks.own_stack()[1]
