"""What the tests of the reward room share: a guard against hangs, and ways to drive a pool."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from megatron_rl.reward.pool import Outcome, WorkerPool

LIMIT_S = 120


@contextlib.contextmanager
def time_limit(limit_s: int = LIMIT_S) -> Iterator[None]:
    """Fail instead of stalling: nothing in this room may hang."""

    def fail(*_: object) -> None:
        raise TimeoutError(f"the test ran for {limit_s} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object], limit_s: float = 20.0) -> bool:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def run_all(pool: WorkerPool, pairs: list[tuple[str, str]]) -> list[Outcome]:
    """Outcomes of the pairs, in their order."""
    for number, pair in enumerate(pairs):
        pool.submit(number, *pair)
    outcomes = {}
    while len(outcomes) < len(pairs):
        outcomes.update(pool.poll(0.5))
    return [outcomes[number] for number in range(len(pairs))]


def wait_ready(pool: WorkerPool, num_workers: int = 1) -> list[int]:
    assert wait_until(lambda: pool.poll(0.05) == [] and len(pool.worker_pids) == num_workers)
    return pool.worker_pids


def kill_and_wait(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid))
