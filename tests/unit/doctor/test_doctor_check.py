"""A check that raises, crashes or hangs is told, and takes no other with it."""

import subprocess
import time

import pytest

from megatron_rl.doctor.check import AGAIN, Check, failed, ok, run_checks, warning

SECONDS = 60.0  # for a process to start on a busy machine


def check(name, look, remedy="the check's"):
    return Check(name=name, look=look, remedy=remedy)


def is_there(pid):
    """False for one that has ended, even where nobody has waited for it."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids):
    """Soon: the kernel ends what has been killed when it comes to it."""
    left, deadline = list(pids), time.monotonic() + 10
    while any(map(is_there, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_there, left))


def test_results_come_in_order_and_with_remedies():
    def raises():
        raise ZeroDivisionError("by zero")

    results = run_checks(
        [
            check("slow", lambda: time.sleep(0.2) or ok("fine")),
            check("raises", raises),
            check("bad", lambda: failed("broken")),
            check("worse", lambda: failed("broken", "its own")),
            check("so so", lambda: warning("weak", "stronger")),
        ],
        deadline_s=SECONDS,
    )
    assert [(r.name, r.outcome, r.found, r.remedy) for r in results] == [
        ("slow", "ok", "fine", ""),
        ("raises", "failed", "ZeroDivisionError: by zero", "the check's"),
        ("bad", "failed", "broken", "the check's"),
        ("worse", "failed", "broken", "its own"),
        ("so so", "warning", "weak", "stronger"),
    ]


def test_a_thread_that_hangs_is_left_behind_at_the_deadline():
    start = time.monotonic()
    hung, fine = run_checks(
        [check("hung", lambda: time.sleep(30)), check("fine", lambda: ok("done"))], deadline_s=1.0
    )
    assert time.monotonic() - start < 10
    assert (hung.outcome, hung.found, hung.remedy) == ("failed", "no answer within 1 s", AGAIN)
    assert fine.outcome == "ok"


def test_processes_apart_answer_raise_and_crash_each_by_itself(pids, monkeypatch):
    monkeypatch.setenv("RANK", "3")  # of torchrun, which is none of theirs
    works, fault, raises, crashes, missing = run_checks(
        [
            check(name, f"apart_functions:{name}")
            for name in ("works", "finds_a_fault", "raises", "crashes", "no_such")
        ],
        deadline_s=SECONDS,
    )
    assert (works.outcome, works.found) == ("ok", "RANK=None")
    assert (fault.found, fault.remedy) == ("a fault", "its own remedy")
    assert (raises.outcome, raises.found) == ("failed", "ValueError: two lines")
    assert raises.remedy == "the check's"
    assert crashes.outcome == "failed"
    assert crashes.found == "its process ended with SIGSEGV; its last line: about to crash"
    assert missing.found.startswith("AttributeError: ")


class HurriedPopen(subprocess.Popen):
    """A process whose time is over as soon as it has begun to hang, however long it took to."""

    hangs = staticmethod(lambda: False)

    is_late = False

    def wait(self, timeout=None):
        while not (self.is_late or self.hangs() or self.poll() is not None):
            time.sleep(0.05)
        if not self.is_late and self.poll() is None:
            self.is_late = True
            raise subprocess.TimeoutExpired(self.args, timeout)
        return super().wait(timeout)


@pytest.fixture
def ended_once(monkeypatch):
    """Lets processes apart run out of time once a condition is met."""

    def use(is_met):
        monkeypatch.setattr(HurriedPopen, "hangs", staticmethod(is_met))
        monkeypatch.setattr("megatron_rl.doctor.check.subprocess.Popen", HurriedPopen)

    return use


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_with_all_that_it_started(pids, ended_once):
    ended_once(lambda: pids.exists() and pids.read_text())
    (hung,) = run_checks([check("hung", "apart_functions:hangs")], deadline_s=SECONDS)
    assert hung.outcome == "failed"
    assert hung.found == "no answer within 60 s; its last line: waiting"
    assert hung.remedy == AGAIN
    assert all_end(map(int, pids.read_text().split()))


@pytest.mark.slow
def test_a_collective_that_hangs_is_ended_at_the_deadline(pids, ended_once):
    ended_once(lambda: len(started(pids)) == 2)
    (hung,) = run_checks(
        [check("all-reduce", "apart_functions:hangs_in_a_collective")], deadline_s=SECONDS
    )
    assert hung.outcome == "failed"
    assert hung.found.startswith("no answer within 60 s")
    assert all_end(started(pids))


def started(pids):
    """The ranks that have said who they are."""
    return [int(text) for file in pids.parent.glob("pids-*") if (text := file.read_text())]


def test_a_process_that_gives_no_answer_in_time_is_ended(pids):
    """By the clock, which it may not even start within."""
    hung, fine = run_checks(
        [check("hung", "apart_functions:hangs"), check("fine", lambda: ok("done"))], deadline_s=1.0
    )
    assert hung.found.startswith("no answer within 1 s")
    assert fine.outcome == "ok"
