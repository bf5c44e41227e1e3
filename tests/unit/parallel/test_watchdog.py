"""What readers make of beats; whole jobs that hang are in tests/e2e/test_hangs.py."""

import os
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_rl.errors import END_FILE
from megatron_rl.parallel import watchdog as module
from megatron_rl.parallel.config import WatchdogConfig
from megatron_rl.parallel.stacks import Process
from megatron_rl.parallel.watchdog import Watchdog
from megatron_rl.platforms import host_memory


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def pair(clock, monkeypatch):
    """Two ranks on one store, without their threads; the alarms that were raised."""
    store = dist.HashStore()
    alarms = []
    monkeypatch.setattr(Watchdog, "_answer", lambda self: alarms.append(self._get("alarm")))
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    config = WatchdogConfig(min_s=10.0, start_s=50.0, factor=3.0)
    ranks = [Watchdog(config, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank._store = store
        rank.begin(1)
    return ranks, alarms


def test_the_last_alarm_never_goes_off_too_early_and_is_new_only_where_it_must(clock, monkeypatch):
    """Of many short phases: an alarm is a new thread, which costs as much as such a phase."""
    set_at = []
    monkeypatch.setattr(
        module.faulthandler,
        "dump_traceback_later",
        lambda seconds, exit: set_at.append((clock.now, clock.now + seconds)),
    )
    watchdog = Watchdog(WatchdogConfig(min_s=10.0, start_s=50.0, factor=3.0), 0, 1)
    watchdog._store = dist.HashStore()
    for number in range(100):
        clock.now += 0.05
        with watchdog.phase("a" if number else "long"):
            deadline = clock.now + 2 * watchdog._beat.deadline + module.SECONDS_TO_PRINT
            assert deadline <= set_at[-1][1] <= deadline + 0.5
    assert len(set_at) < 20


def look(ranks, clock, seconds):
    """Let time pass and the threads look, as often as they would."""
    for _ in range(int(seconds / 0.5)):
        clock.now += 0.5
        for rank in ranks:
            rank._say_if_late()
            rank._look()


def test_a_phase_may_last_a_multiple_of_what_is_usual(pair, clock):
    (rank, _), _ = pair
    assert rank._deadline("update") == 50.0  # nothing is known of it yet
    for seconds in (1.0, 2.0, 30.0):
        with rank.phase("update"):
            clock.now += seconds
    assert rank._deadline("update") == 10.0  # 3 x 2 s is less
    rank._usual["update"] = [8.0, 9.0, 2.0]
    assert rank._deadline("update") == 24.0


def test_where_nobody_moves_an_alarm_is_raised(pair, clock):
    ranks, alarms = pair
    look(ranks, clock, 9.0)
    assert not alarms
    look(ranks, clock, 2.0)
    assert alarms


def test_a_rank_that_waits_is_no_alarm_while_another_makes_progress(pair, clock, monkeypatch):
    ranks, alarms = pair
    monkeypatch.setattr(module, "own_stack", lambda: ([], True))
    for _ in range(20):
        ranks[1].progress()
        look(ranks, clock, 4.0)
    assert not alarms
    look(ranks, clock, 12.0)
    assert alarms


def test_a_rank_that_does_something_else_is_one_all_the_same(pair, clock, monkeypatch):
    ranks, alarms = pair
    monkeypatch.setattr(module, "own_stack", lambda: ([], False))
    for _ in range(4):
        ranks[1].progress()
        look(ranks, clock, 3.0)
    assert alarms


def test_a_rank_that_does_not_answer_is_one_too(pair, clock, monkeypatch):
    """Its thread does not run, so it does not say that it waits."""
    ranks, alarms = pair
    monkeypatch.setattr(ranks[1], "_say_if_late", lambda: None)
    monkeypatch.setattr(ranks[1], "_look", lambda: None)
    for _ in range(4):
        ranks[0].progress()
        look(ranks, clock, 4.0)
    assert alarms


def test_a_rank_that_has_ended_as_it_should_is_not_late(pair, clock):
    ranks, alarms = pair
    for rank in ranks:
        rank.close()
    look(ranks, clock, 100.0)
    assert not alarms


def test_only_the_first_failure_is_told(pair):
    ranks, _ = pair
    assert ranks[1].fail("KeyError: 'x'")
    assert not ranks[0].fail("RuntimeError: Connection closed by peer")
    assert not ranks[0].fail("ValueError: another")


def test_a_broken_connection_waits_for_who_broke_it(pair, clock):
    ranks, _ = pair
    before = clock.now
    assert ranks[0].fail("RuntimeError: Connection closed by peer")  # nobody else says why
    assert clock.now - before >= module.SECONDS_TO_HEAR_OF_A_FAILURE


def test_after_a_broken_connection_those_are_named_that_do_not_answer(clock):
    store, ranks = dist.HashStore(), []
    for number in range(4):
        rank = Watchdog(WatchdogConfig(), number, 4)
        rank._store = store
        ranks.append(rank)
        who = {"host": f"node{number // 2}", "pid": number, "stack_file": ""}
        rank._set(f"who/{number}", who)
    ranks[0]._set("heard/0", {})  # its thread has seen the failure; those of 2 and 3 have not
    said = ranks[1].fail("RuntimeError: Connection reset by peer")
    assert "Connection reset by peer. No answer from ranks 2, 3 on node1. " in said


def test_after_a_broken_connection_nobody_is_blamed_where_all_answer(pair):
    ranks, _ = pair
    ranks[1]._set("heard/1", {})
    assert ranks[0].fail("RuntimeError: Broken pipe") == "RuntimeError: Broken pipe"


def test_a_store_that_is_gone_with_its_node_is_named(pair, monkeypatch):
    ranks, _ = pair

    class Gone:
        def check(self, _):
            raise RuntimeError("Broken pipe")

    ranks[0]._store = Gone()
    assert ranks[0].fail("RuntimeError: Connection reset by peer").endswith(module.STORE_IS_GONE)


def test_the_message_names_the_one_that_is_behind_and_does_not_wait():
    def answer(number, is_waiting, *stack):
        return {"number": number, "iteration": 7, "phase": "update", "stack": list(stack)} | {
            "is_waiting": is_waiting
        }

    answers = {
        0: answer(5, True, "a.py:1 in f", "torch/distributed/c10d.py:2 in wait"),
        1: answer(5, False, "b.py:3 in g"),
        2: answer(6, False, "c.py:4 in h"),
    }
    who = {rank: {"pid": 100 + rank, "host": "node"} for rank in range(4)}
    text = module._message({"seconds": 12.0, "deadline": 10.0}, answers, who, 4)
    assert "the job stands still for 12 s in iteration 7, update (deadline 10 s" in text
    assert text.count("stuck: ") == 1
    assert "stuck: rank 1, process 101 on node: b.py:3 in g" in text
    assert "waiting for it: ranks 0, 2" in text
    assert "without an answer: ranks 3" in text
    assert text.index("stack of rank 1") < text.index("stack of rank 0")


def test_without_a_store_phases_are_kept_and_nothing_is_sent():
    watchdog = Watchdog(WatchdogConfig(enabled=False), 0, 1)
    watchdog.start(None)
    watchdog.begin(3)
    with watchdog.phase("update"):
        assert watchdog.place == "iteration 3, update"
    watchdog.progress()
    assert watchdog.fail("anything")
    watchdog.close()


@pytest.mark.parametrize("is_for_memory", [True, False])
def test_a_rank_that_the_kernel_killed_for_memory_is_called_that(
    pair, monkeypatch, tmp_path, capfd, is_for_memory
):
    ranks, _ = pair
    vmstat = tmp_path / "proc" / "vmstat"
    vmstat.parent.mkdir()
    vmstat.write_text("nr_free_pages 7\noom_kill 3\n")
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    ranks[0]._oom_kills = host_memory.OomKills()
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Process(host=socket.gethostname(), pid=killed.pid, stack_file="")
    ranks[0]._processes = {1: here}
    ranks[0]._world_size = 1  # so that nobody else is asked for
    ranks[0]._leave_with_others()
    assert capfd.readouterr().err == ""
    killed.kill()
    killed.wait()
    vmstat.write_text(f"nr_free_pages 7\noom_kill {3 + is_for_memory}\n")
    monkeypatch.setattr(module, "_leave", sys.exit)
    with pytest.raises(SystemExit):
        ranks[0]._leave_with_others()
    said = capfd.readouterr().err
    if is_for_memory:
        assert said.startswith(
            f"megatron-rl: error: rank 1 on {socket.gethostname()} (process {killed.pid}) was "
            f"killed by the kernel, which ran out of memory (oom_kill of {vmstat}: 3 -> 4)"
        )
        assert "batching.max_tokens_per_microbatch" in said
    else:
        assert "is gone: it was killed or ended without a word" in said


def test_a_kill_of_long_ago_is_not_held_against_a_rank_that_is_gone(monkeypatch, tmp_path):
    vmstat = tmp_path / "proc" / "vmstat"
    vmstat.parent.mkdir()
    vmstat.write_text("oom_kill 3\n")
    monkeypatch.setattr(host_memory, "ROOT", tmp_path)
    kills = host_memory.OomKills()
    vmstat.write_text("oom_kill 4\n")  # a worker of the reward, for one
    for _ in range(host_memory.LOOKS - 1):
        kills.look()
        assert kills.risen() is not None
    kills.look()
    assert kills.risen() is None


# A rank's process with its real thread, whose main thread waits for ever.
RANK = """
import sys, time
import torch.distributed as dist
from megatron_rl.parallel.config import WatchdogConfig
from megatron_rl.parallel.watchdog import Watchdog

ending, code = sys.argv[1:]
store = dist.HashStore()
config = WatchdogConfig(min_s=0.5, start_s=0.5 if ending == "stands still" else 1000.0)
num_ranks = 1 if ending == "stands still" else 2
Watchdog(config, 0, num_ranks).start(store)
if ending == "another fails":
    another = Watchdog(config, 1, 2)
    another._store = store
    another.fail("ValueError: of another node", int(code))
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("ending", "code"), [("stands still", 75), ("another fails", 1), ("another fails", 2)]
)
def test_who_starts_torchrun_learns_how_a_rank_ended(tmp_path, ending, code):
    """torchrun itself says 1 of all of them."""
    noted = tmp_path / "end"
    done = subprocess.run(
        [sys.executable, "-c", RANK, ending, str(code)],
        env=os.environ | {END_FILE: str(noted)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert noted.read_text() == f"{code}\n"
