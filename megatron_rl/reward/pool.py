"""Worker processes with a hard deadline per sample, driven from the trainer without blocking it.

A deadline counts the worker's CPU time: under a wall clock alone a verdict would depend on how busy
the node is. The kill is SIGKILL, since neither SIGTERM nor an alarm ends a loop in C.

What happens to a pair of strings, which is a job here:

    submit     it waits, then goes to the ready worker that has fewest jobs, if it has room for one
    answered   its outcome comes out of poll()
    too slow   outcome "timeout"; the worker is killed and replaced
    crashed    its worker is replaced, and the job is tried once more; then outcome "error"
    no zygote  the process that forks workers (worker.py) is gone and they with it: all are started
               again, and the job is tried once more; then outcome "error"

A worker has some jobs in its queue, so that it goes on while the trainer is busy. It does them one
by one: the deadline of a job begins with the answer to the one before it, and what happens to a job
is not charged to those behind it, which go to another worker.
"""

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from megatron_rl.errors import InputError, RunError
from megatron_rl.reward.channel import Frames, Message, encode
from megatron_rl.reward.math_grader import VerdictName

WALL_FACTOR = 20  # a job that sleeps uses no CPU time; it ends after so many deadlines by the clock
JOBS_AT_ONCE = 8  # in a worker's queue, so that it has something to do between two polls
_START_LIMIT_S = 60.0  # for a worker's imports
_MAX_ZYGOTE_STARTS = 3  # in a row, without an outcome of a worker in between
_MAX_FAILED_STARTS = 8  # workers in a row that end before they are ready
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one job."""

    verdict: VerdictName | None  # None: a user's function returned the reward itself
    seconds: float  # CPU time of the worker
    reward: float | None = None
    reason: str | None = None  # why there was a timeout or an error
    is_misuse: bool = False  # True: the function is at fault, whatever the data
    has_raised: bool = False  # True: the function raised, which the data may have been the cause of


@dataclass(slots=True)
class _Job:
    id: int
    request: bytes
    has_been_tried: bool = False
    has_lost_zygote: bool = False  # it was in hand when the process that forks workers ended


@dataclass(slots=True, eq=False)
class _Worker:
    connection: socket.socket
    started: float  # wall clock at which the worker, or then its first job, was started
    frames: Frames = field(default_factory=Frames)
    outbox: bytes = b""  # the part of the request that the socket has not taken yet
    pid: int | None = None  # None until the worker has told it
    is_ready: bool = False  # its function is loaded
    jobs: deque[_Job] = field(default_factory=deque)  # the first one is at work
    cpu_before: float = 0.0  # CPU seconds that it had used when that one began


class WorkerPool:
    """Runs `verify_pair`, or a user's function, on pairs of strings."""

    def __init__(
        self,
        *,
        num_workers: int,
        deadline_s: float,
        memory_bytes: int,
        function: str | None = None,
        setting: str = "reward.function",
    ) -> None:
        """function: import path of a user's function; setting: the setting that names it."""
        self._num_workers = num_workers
        self._deadline_s = deadline_s
        self._setting = setting
        self._settings = {"memory_bytes": memory_bytes, "function": function}
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._waiting: deque[_Job] = deque()
        self._finished: list[tuple[int, Outcome]] = []
        self._zygote_starts = 0
        self._failed_starts = 0
        self._start_zygote()

    @property
    def num_pending(self) -> int:
        """The number of jobs that wait or are at work."""
        return len(self._waiting) + sum(len(worker.jobs) for worker in self._workers)

    @property
    def worker_pids(self) -> list[int]:
        """Pids of the workers that are ready."""
        return [worker.pid for worker in self._workers if worker.is_ready and worker.pid]

    @property
    def zygote_pid(self) -> int:
        return self._zygote.pid

    def submit(self, job_id: int, left: str, right: str) -> None:
        """Queue a pair; its outcome comes out of a later `poll` under the same id."""
        self._waiting.append(_Job(job_id, encode({"left": left, "right": right})))
        self._dispatch()

    def poll(self, wait_s: float = 0.0) -> list[tuple[int, Outcome]]:
        """(job id, outcome) of the jobs that ended since the last call.

        It waits at most wait_s for something to happen. Raises InputError when the user's function
        cannot be loaded, RunError when workers cannot be kept alive.
        """
        for key, events in self._selector.select(min(wait_s, self._deadline_s / 4)):
            worker = key.data
            if worker is None:
                self._zygote_spoke()
                break  # its workers are gone as well, so other events of this poll are stale
            if worker not in self._workers:
                continue
            if events & selectors.EVENT_READ:
                self._read(worker)
            if events & selectors.EVENT_WRITE and worker in self._workers:
                self._flush(worker)
        self._end_overdue()
        self._dispatch()
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """End all processes; pending samples are dropped."""
        self._drop_workers()
        self._control.close()  # the zygote kills its workers and leaves
        try:
            self._zygote.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._zygote.kill()
            self._zygote.wait()
        self._selector.close()

    def _start_zygote(self) -> None:
        self._zygote_starts += 1
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "megatron_rl.reward.worker"
        with theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=_worker_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control.send(json.dumps(self._settings).encode())
        self._selector.register(self._control, selectors.EVENT_READ, None)
        for _ in range(self._num_workers):
            self._start_worker()

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair()
        # Sending fails when the zygote is gone, which its socket reports in the next poll.
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self._control, [b"fork"], [theirs.fileno()])
        ours.setblocking(False)
        worker = _Worker(ours, started=time.monotonic())
        self._workers.append(worker)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _zygote_spoke(self) -> None:
        """Start another zygote where it ended; all it ever says is why it cannot start."""
        try:
            complaint = self._control.recv(1 << 12, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            complaint = b""
        if complaint:
            raise InputError(
                f"reward workers cannot start: {complaint.decode(errors='replace')}. They need "
                "math-verify; install the package's requirements for this interpreter"
            )
        if self._zygote_starts >= _MAX_ZYGOTE_STARTS:
            raise RunError(
                f"reward workers died {self._zygote_starts} times in a row with the process they "
                f"are forked from (exit code {self._zygote.poll()}), and gave no verdict between: "
                "look for the kernel's out-of-memory killer on this node; fewer reward.num_workers "
                "need less memory"
            )
        for worker in self._workers:
            if worker.jobs and worker.jobs[0].has_lost_zygote:
                seconds = time.monotonic() - worker.started
                reason = "the process that workers are forked from died twice meanwhile"
                self._finish(worker, Outcome("error", seconds, reason=reason))
            elif worker.jobs:
                worker.jobs[0].has_lost_zygote = True
            self._take_back(worker)
        self._drop_workers()
        self._selector.unregister(self._control)
        self._control.close()
        self._zygote.kill()
        self._zygote.wait()
        self._start_zygote()

    def _zygote_is_gone(self) -> bool:
        try:
            return not self._control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _drop_workers(self) -> None:
        for worker in self._workers:
            self._selector.unregister(worker.connection)
            worker.connection.close()
        self._workers.clear()

    def _dispatch(self) -> None:
        while self._waiting:
            ready = [worker for worker in self._workers if worker.is_ready]
            worker = min(ready, key=lambda one: len(one.jobs), default=None)
            if worker is None or len(worker.jobs) == JOBS_AT_ONCE:
                return
            if not worker.jobs and not _is_connected(worker.connection):
                self._worker_ended(worker)  # it died while idle: no job is charged for it
                if worker in self._workers:
                    return  # the zygote is gone, too, which the next poll finds
            else:
                self._assign(worker)

    def _assign(self, worker: _Worker) -> None:
        if not worker.jobs:
            worker.started = time.monotonic()
            worker.cpu_before = _cpu_seconds(worker.pid)
        worker.jobs.append(self._waiting.popleft())
        worker.outbox += worker.jobs[-1].request
        self._flush(worker)

    def _take_back(self, worker: _Worker) -> None:
        """What is in a worker's queue waits again, before all others."""
        self._waiting.extendleft(reversed(worker.jobs))
        worker.jobs.clear()

    def _flush(self, worker: _Worker) -> None:
        try:
            worker.outbox = worker.outbox[worker.connection.send(worker.outbox) :]
        except BlockingIOError:
            pass
        except OSError:
            worker.outbox = b""  # it has ended, which is read behind its last answers
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outbox else 0)
        self._selector.modify(worker.connection, events, worker)

    def _read(self, worker: _Worker) -> None:
        try:
            data = worker.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        # Those that came before bytes of no message are answers of other jobs.
        for message in worker.frames.feed(data):
            self._handle(worker, message)
        if worker in self._workers and (not data or worker.frames.is_garbled):
            self._worker_ended(worker)

    def _handle(self, worker: _Worker, message: Message) -> None:
        if "failed" in message:
            raise InputError(
                f"{self._setting}={self._settings['function']!r}: {message['failed']}. It must be "
                "importable in a worker process (same interpreter and import path as here, no "
                "other environment variables, reward.memory_mib of address space)"
            )
        if "pid" in message and worker.pid is None:
            worker.pid = int(message["pid"])
        elif "ready" in message:
            worker.is_ready = True
            self._failed_starts = 0
        elif worker.jobs:
            self._zygote_starts = 0
            self._finish(worker, _outcome(message, self._deadline_s))
            worker.started = time.monotonic()
            worker.cpu_before = float(message.get("cpu", worker.cpu_before))
            if message.get("is_last"):
                self._replace(worker)  # it leaves, and has begun none of the others

    def _finish(self, worker: _Worker, outcome: Outcome) -> None:
        """The outcome of the job at work."""
        self._finished.append((worker.jobs.popleft().id, outcome))

    def _worker_ended(self, worker: _Worker) -> None:
        """Replace a worker that died; its job gets one more try."""
        if self._zygote_is_gone():
            return  # it took its workers along; `_zygote_spoke` will start all of them again
        if worker.jobs and not worker.jobs[0].has_been_tried:
            worker.jobs[0].has_been_tried = True
        elif worker.jobs:
            seconds = time.monotonic() - worker.started
            self._finish(worker, Outcome("error", seconds, reason="its worker died twice"))
        if not worker.is_ready:
            self._failed_starts += 1
            if self._failed_starts > _MAX_FAILED_STARTS:
                raise RunError(
                    f"reward workers: {self._failed_starts} in a row ended before their first "
                    "sample, though at least one must start. Raise reward.memory_mib, or look for "
                    "limits on processes and memory of this node"
                )
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Kill what is left of a worker's process group, and start another worker in its place."""
        self._take_back(worker)
        self._selector.unregister(worker.connection)
        worker.connection.close()
        self._workers.remove(worker)
        if worker.pid is not None:
            # Sending fails when the zygote is gone, and then its workers are gone too.
            with contextlib.suppress(OSError):
                self._control.send(str(worker.pid).encode())
        self._start_worker()

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            wall = now - worker.started
            if not worker.jobs:
                if not worker.is_ready and wall > _START_LIMIT_S:
                    raise RunError(
                        f"a reward worker did not start within {_START_LIMIT_S:.0f} s. An import "
                        f"of {self._setting}={self._settings['function']!r} may hang; time it in a "
                        "fresh interpreter"
                    )
                continue
            if wall < self._deadline_s / 2:
                continue  # it cannot be overdue yet: spare a read of /proc
            seconds = _cpu_seconds(worker.pid) - worker.cpu_before
            if seconds > self._deadline_s or wall > WALL_FACTOR * self._deadline_s:
                reason = f"still running after {seconds:.2f} s of CPU, {wall:.2f} s of wall time"
                self._finish(worker, Outcome("timeout", seconds, reason=reason))
                self._replace(worker)


def _outcome(message: Message, deadline_s: float) -> Outcome:
    seconds = float(message.get("seconds", 0.0))
    if seconds > deadline_s:
        # It ended before anybody looked; a verdict must not depend on how often poll() is called.
        return Outcome("timeout", seconds, reason=f"took {seconds:.2f} s of CPU")
    return Outcome(
        message.get("verdict"),
        seconds,
        reward=message.get("reward"),
        reason=message.get("reason"),
        is_misuse=bool(message.get("is_misuse")),
        has_raised=bool(message.get("has_raised")),
    )


def _is_connected(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _cpu_seconds(pid: int | None) -> float:
    """The CPU time that a process has used, 0.0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S  # utime and stime, proc(5)


def _worker_environment() -> dict[str, str]:
    """The environment of a worker: enough to start, and none of the trainer's tokens and keys."""
    environment = {
        name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
    }
    return environment | {
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # sympy's order of terms follows hashes: verdicts must repeat
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
    }
