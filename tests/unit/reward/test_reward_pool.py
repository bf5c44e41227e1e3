"""Workers under abuse. Every test ends with a right verdict for an ordinary pair."""

import os
import signal
import subprocess
import sys
import time

import pytest
from reward_helpers import is_alive, kill_and_wait, run_all, wait_ready, wait_until

from megatron_rl.errors import InputError, RunError
from megatron_rl.reward.channel import MAX_REPLY_BYTES, Frames, encode

ROOTS = (r"2\sqrt{3}", r"\sqrt{12}")
SQUARE = ("x^2-1", "(x-1)(x+1)")
OTHER = ("x+1", "y+1")
HOSTILE = [
    ("4", "9^{9^{9^{9}}}"),
    ("4", "2^{2^{2^{2^{2^{2}}}}}"),
    ("4", r"\frac{1}{" * 60 + "1" + "}" * 60),
    ("4", r"\{" + ",".join(map(str, range(2000))) + r"\}"),
    ("4", "\x00\ud800\u202e"),
    ("4", "__import__('os')._exit(0)"),
]


def verdicts(outcomes):
    return [outcome.verdict for outcome in outcomes]


def test_pairs_are_compared(make_pool):
    outcomes = run_all(make_pool(num_workers=2, deadline_s=10.0), [ROOTS, SQUARE, OTHER] * 5)
    assert verdicts(outcomes) == ["correct", "correct", "wrong"] * 5
    assert all(0 <= outcome.seconds < 10 for outcome in outcomes)


def test_hostile_answers_end_and_harm_nobody(make_pool):
    pool = make_pool(num_workers=2, deadline_s=2.0)
    outcomes = run_all(pool, [*HOSTILE, ROOTS])
    assert outcomes[0].verdict == "timeout"
    assert "s of CPU" in outcomes[0].reason
    assert set(verdicts(outcomes[:-1])) <= {"timeout", "wrong", "error"}
    assert outcomes[-1].verdict == "correct"
    assert verdicts(run_all(pool, [ROOTS, SQUARE])) == ["correct", "correct"]


def test_memory_limit_holds(make_pool):
    # 10^8 digits and more: without the limit this takes gigabytes before the deadline.
    pool = make_pool(deadline_s=3.0, memory_bytes=256 << 20)
    assert run_all(pool, [("4", "2^{8589934592}")])[0].verdict in ("wrong", "error", "timeout")
    assert verdicts(run_all(pool, [ROOTS])) == ["correct"]


def test_worker_killed_while_idle_costs_nothing(make_pool):
    pool = make_pool(num_workers=2, deadline_s=10.0)
    for pid in wait_ready(pool, 2):
        kill_and_wait(pid)
    assert verdicts(run_all(pool, [ROOTS, OTHER])) == ["correct", "wrong"]


def test_worker_killed_while_working_gets_another_try(make_pool):
    pool = make_pool("reward_functions:misbehave", deadline_s=10.0)
    (idle,) = wait_ready(pool)
    kill_and_wait(idle)
    pool.submit(0, "nap", "")  # finds its worker dead: not counted as a try
    assert wait_until(lambda: pool.poll(0.05) == [] and pool.worker_pids not in ([], [idle]))
    (victim,) = pool.worker_pids
    kill_and_wait(victim)
    while not (finished := pool.poll(0.5)):
        pass
    assert [(number, outcome.verdict) for number, outcome in finished] == [(0, "correct")]
    assert pool.worker_pids != [victim]


def test_sample_whose_worker_dies_twice_is_an_error(make_pool):
    pool = make_pool("reward_functions:misbehave", deadline_s=10.0)
    (victim,) = wait_ready(pool)
    pool.submit(0, "sleep", "")
    pool.poll()
    kill_and_wait(victim)
    assert wait_until(lambda: pool.poll(0.05) == [] and pool.worker_pids not in ([], [victim]))
    assert pool.num_pending == 1  # on its second worker
    kill_and_wait(pool.worker_pids[0])
    while not (finished := pool.poll(0.5)):
        pass
    assert [(outcome.verdict, outcome.reason) for _, outcome in finished] == [
        ("error", "its worker died twice")
    ]
    assert verdicts(run_all(pool, [("anything", "")])) == ["correct"]


def test_stopped_worker_times_out_by_wall_clock(make_pool):
    pool = make_pool(deadline_s=0.1)
    os.kill(wait_ready(pool)[0], signal.SIGSTOP)
    (outcome,) = run_all(pool, [ROOTS])
    assert outcome.verdict == "timeout"


def test_large_and_odd_text_goes_through_without_blocking(make_pool):
    pool = make_pool("reward_functions:same_length", deadline_s=10.0)
    wait_ready(pool)
    text = '\x00\ud800\u4e2d\\"' * 500_000
    started = time.monotonic()
    pool.submit(0, text, text)
    assert time.monotonic() - started < 5.0
    while not (finished := pool.poll(0.5)):
        pass
    assert finished[0][1].verdict == "correct"


@pytest.mark.parametrize(
    ("action", "verdict", "reason"),
    [
        ("loop in c", "timeout", "s of CPU"),
        ("sys.exit", "error", "SystemExit"),
        ("os._exit", "error", "died twice"),
        ("raise", "error", "ValueError: broken"),
        ("raise badly", "error", "_BadError"),
        ("allocate", "error", "MemoryError"),
        ("recurse", "error", "RecursionError"),
        ("nan", "error", "must be finite"),
        ("huge", "error", "must be finite"),
        ("too large for float32", "error", "at most 1e+09 in size"),
        ("none", "error", "returned a NoneType"),
        ("garble", "error", "died twice"),
        ("print", "correct", None),
        ("fork", "correct", None),
    ],
)
def test_functions_that_misbehave(make_pool, action, verdict, reason):
    pool = make_pool("reward_functions:misbehave", deadline_s=0.5)
    hostile, after = run_all(pool, [(action, ""), ("no", "")])
    assert hostile.verdict == verdict
    assert hostile.reason is None if reason is None else reason in hostile.reason
    assert after.verdict == "wrong"  # not the reply to the one before


def test_a_function_that_returns_what_numpy_compares(make_pool):
    pool = make_pool("reward_functions:with_numpy", deadline_s=10.0, memory_bytes=4 << 30)
    outcomes = run_all(pool, [("four", "4444"), ("four", "4"), ("mean", "1 2")])
    assert verdicts(outcomes[:2]) == ["correct", "wrong"]
    assert (outcomes[2].verdict, outcomes[2].reward) == (None, 1.5)


def test_verdict_does_not_depend_on_how_often_the_trainer_looks(make_pool):
    pool = make_pool("reward_functions:misbehave", deadline_s=0.2)
    wait_ready(pool)
    pool.submit(0, "burn", "")
    time.sleep(3.0)  # the reply has long come when somebody looks
    while not (finished := pool.poll(0.5)):
        pass
    assert finished[0][1].verdict == "timeout"


def test_a_worker_goes_on_while_nobody_looks(make_pool):
    """Each of its jobs has a deadline of its own: together they take longer than one."""
    pool = make_pool("reward_functions:misbehave", deadline_s=1.0)
    wait_ready(pool)
    for number in range(5):
        pool.submit(number, "burn", "")
    time.sleep(6.0)
    finished = pool.poll()
    assert [number for number, _ in finished] == [0, 1, 2, 3, 4]
    assert all(outcome.verdict == "correct" for _, outcome in finished)
    assert all(0.4 <= outcome.seconds < 1.0 for _, outcome in finished)
    # Nor are they too slow together while somebody looks.
    assert verdicts(run_all(pool, [("burn", "")] * 5)) == ["correct"] * 5


@pytest.mark.parametrize("action", ["loop in c", "os._exit", "allocate", "child", "garble"])
def test_what_happens_to_a_job_is_not_charged_to_those_behind_it(make_pool, tmp_path, action):
    pool = make_pool("reward_functions:misbehave", deadline_s=0.5)
    wait_ready(pool)
    given = [action, action, "fine", "no", action, "fine", "no"]
    found = verdicts(run_all(pool, [(one, str(tmp_path / "pid")) for one in given]))
    own = "timeout" if action == "loop in c" else "correct" if action == "child" else "error"
    assert found == [own, own, "correct", "wrong", own, "correct", "wrong"]


@pytest.mark.parametrize(
    ("action", "verdict"), [("child", "correct"), ("child, then exit", "error")]
)
def test_children_of_a_function_are_killed(make_pool, tmp_path, action, verdict):
    pool = make_pool("reward_functions:misbehave", deadline_s=10.0)
    record = tmp_path / "pid"
    assert verdicts(run_all(pool, [(action, str(record)), ("fine", "")])) == [verdict, "correct"]
    assert wait_until(lambda: not is_alive(int(record.read_text())))


def test_functions_that_cannot_be_loaded(make_pool):
    expected = {
        "no_such_module:f": "importing no_such_module raises ModuleNotFoundError",
        "reward_functions:missing": "module reward_functions has no attribute missing",
        "reward_functions:not_callable": "not_callable of reward_functions is a int, not callable",
        "reward_functions:one_argument": "cannot be called as one_argument(response, answer)",
    }
    for path, message in expected.items():
        pool = make_pool(path)
        with pytest.raises(InputError) as caught:
            run_all(pool, [("", "")])
        assert message in str(caught.value)
        pool.close()


def test_workers_have_neither_torch_nor_the_trainers_secrets(make_pool, monkeypatch):
    import torch  # noqa: F401 - loaded here, and must not be there

    monkeypatch.setenv("SECRET_TOKEN", "1")
    assert run_all(make_pool("reward_functions:torch_is_loaded"), [("", "")])[0].verdict == "wrong"
    environment = make_pool("reward_functions:environment")
    assert verdicts(run_all(environment, [("", "SECRET_TOKEN"), ("", "PATH")])) == [
        "wrong",
        "correct",
    ]


def test_zygote_is_restarted_and_samples_survive(make_pool):
    pool = make_pool(num_workers=2, deadline_s=10.0)
    wait_ready(pool, 2)
    for _ in range(5):  # in a long run it may die any number of times
        kill_and_wait(pool.zygote_pid)
        assert verdicts(run_all(pool, [ROOTS, OTHER])) == ["correct", "wrong"]


def test_zygote_that_dies_without_a_verdict_between_ends_the_run(make_pool):
    pool = make_pool(deadline_s=10.0)

    def die_again_and_again():
        while True:
            kill_and_wait(pool.zygote_pid)
            pool.poll(0.5)

    with pytest.raises(RunError, match="died 3 times in a row"):
        die_again_and_again()


def test_job_that_takes_the_zygote_along_twice_is_an_error(make_pool):
    pool = make_pool("reward_functions:misbehave", deadline_s=10.0)
    pool.submit(0, "long nap", "")
    finished = []
    for _ in range(2):
        assert wait_until(lambda: pool.poll(0.05) == [] and pool.worker_pids)
        kill_and_wait(pool.zygote_pid)
        finished += pool.poll(0.5)
    assert [(job, outcome.verdict) for job, outcome in finished] == [(0, "error")]
    assert "died twice" in finished[0][1].reason


def test_zygote_takes_its_working_workers_along_uncharged(make_pool):
    pool = make_pool("reward_functions:misbehave", deadline_s=10.0)
    (worker,) = wait_ready(pool)
    pool.submit(0, "long nap", "")
    pool.poll()
    kill_and_wait(pool.zygote_pid)
    assert wait_until(lambda: not is_alive(worker), limit_s=4.5)  # a long nap takes 5 s
    assert wait_until(lambda: pool.poll(0.05) == [] and pool.worker_pids not in ([], [worker]))
    kill_and_wait(pool.worker_pids[0])
    while not (finished := pool.poll(0.5)):
        pass
    assert finished[0][1].verdict == "correct"  # in its third worker


def test_no_process_outlives_a_killed_trainer():
    trainer = subprocess.Popen(
        [sys.executable, "-c", ORPHAN_MAKER],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert len(pids) == 3
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids), limit_s=10.0)


# The sleeper holds a copy of every socket, so the zygote gets no end of file.
ORPHAN_MAKER = """
import os, time
from megatron_rl.reward.pool import WorkerPool
pool = WorkerPool(num_workers=2, deadline_s=1.0, memory_bytes=1 << 30)
while len(pool.worker_pids) < 2:
    pool.poll(0.1)
if os.fork() == 0:
    os.close(1)
    time.sleep(15)
    os._exit(0)
print(pool.zygote_pid, *pool.worker_pids, flush=True)
time.sleep(60)
"""


def test_close_ends_all_processes(make_pool):
    pool = make_pool(num_workers=2)
    pids = [*wait_ready(pool, 2), pool.zygote_pid]
    pool.submit(0, "4", "9^{9^{9^{9}}}")
    pool.close()
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_frames_are_cut_from_any_pieces():
    frames, data = Frames(), encode({"a": 1}) + encode({"b": "\ud800"})
    messages = [message for byte in data for message in frames.feed(bytes([byte]))]
    assert messages == [{"a": 1}, {"b": "\ud800"}]


@pytest.mark.parametrize(
    "data",
    [
        (MAX_REPLY_BYTES + 1).to_bytes(4, "little"),
        b"\x02\x00\x00\x00[]",
        b"\x02\x00\x00\x00{{",
        b"\x60\xea\x00\x00" + b"[" * 60_000,
    ],
)
def test_frames_take_nothing_behind_what_no_worker_sends(data):
    frames = Frames()
    assert frames.feed(encode({"a": 1})) == [{"a": 1}]
    assert not frames.is_garbled
    assert frames.feed(encode({"b": 2}) + data + encode({"c": 3})) == [{"b": 2}]
    assert frames.is_garbled
    assert frames.feed(encode({"d": 4})) == []


def test_answers_before_garbled_bytes_count(make_pool):
    """However late the trainer reads them: all in one read, here."""
    pool = make_pool("reward_functions:misbehave", deadline_s=5.0)
    wait_ready(pool)
    for number, given in enumerate(["fine", "no", "garble", "fine"]):
        pool.submit(number, given, "")
    found = {}
    while len(found) < 4:
        time.sleep(1.0)
        found |= dict(pool.poll(0.5))
    assert verdicts([found[number] for number in range(4)]) == [
        "correct", "wrong", "error", "correct",
    ]  # fmt: skip


def test_answers_of_a_worker_that_has_died_count_when_another_job_is_for_it(make_pool):
    pool = make_pool("reward_functions:misbehave", deadline_s=5.0)
    wait_ready(pool)
    for number, given in enumerate(["fine", "os._exit"]):
        pool.submit(number, given, "")
    found = {}
    for number in range(2, 6):
        time.sleep(1.0)  # the worker has answered the first and died of the second
        pool.submit(number, "no", "")
        found |= dict(pool.poll(0.5))
    while len(found) < 6:
        found |= dict(pool.poll(0.5))
    assert verdicts([found[number] for number in range(6)]) == [
        "correct", "error", "wrong", "wrong", "wrong", "wrong",
    ]  # fmt: skip
