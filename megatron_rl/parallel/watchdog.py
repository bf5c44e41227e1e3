"""A thread on every rank that says which rank a job waits for, and ends a job that stands still.

Every rank publishes the phase that it is in. A phase may last ten times as long as it usually does;
what it usually does is learned in the run. Engine steps are progress, so a long evaluation is not a
standstill, and a rank that only waits is not one while another makes progress. Else two ranks (one
may be the one that hangs) ask all for their stacks, and one message names who stands still, where,
and who waits for it. Who cannot answer is looked at from outside, by a rank on the same machine.

The same thread ends its rank when another one has failed or is gone: then only one tells why.

    beat/<rank>     the phase at hand, written when it changes or makes progress
    late/<rank>     whether a rank that is over its time waits for others
    who/<rank>      host and process
    alarm           set once: a phase took too long; every rank answers
    answer/<rank>   its stack
    ended           the message is printed, everybody leaves
    failed          set once, by the first rank that fails: who, why, and its exit code
    heard/<rank>    it knows of that
    bye/<rank>      it ended as it should
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch._C._distributed_c10d import Store

from megatron_rl.errors import BROKEN, note_end
from megatron_rl.parallel.config import WatchdogConfig
from megatron_rl.parallel.stacks import Process, look_at, own_stack, this_process
from megatron_rl.platforms.host_memory import OomKills

STUCK = 75
"""The exit code of every rank of a job that stood still."""

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_OF_A_STEP = 2.0  # steps of less than this are one
SECONDS_FOR_ANSWERS = 3.0
SECONDS_TO_PRINT = 15.0
SECONDS_TO_HEAR_OF_A_FAILURE = 2.0
PHASES_REMEMBERED = 50
BETWEEN = "between phases"
WAITING = "waiting for other ranks"
SHOW_CURSOR = b"\x1b[?25h"
LESS_MEMORY = (
    "Set a lower batching.max_tokens_per_microbatch, or model.recompute_granularity=full "
    "model.recompute_method=uniform model.recompute_num_layers=1, or start fewer ranks on a "
    "machine; `megatron-rl plan` says what a rank needs"
)
# What a rank says whose peer has ended, in a collective over gloo or in shared memory.
COLLATERAL = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "has ended or left the group",
)
LOST = "Their machine or its network is lost, or they were killed; the same command goes on"
STORE_IS_GONE = (
    "torchrun's store does not answer either: the first node is lost, or its network; "
    "the same command goes on"
)


@dataclass(kw_only=True)
class _Beat:
    """What a rank says of itself, and when the reader heard it first."""

    number: int  # of phases so far, which ranks can be compared by
    iteration: int
    phase: str
    deadline: float = math.inf
    steps: int = 0  # of progress in the phase
    heard: float = field(default_factory=lambda: time.monotonic())


class Watchdog:
    """This rank's part; without `start` it only keeps the phases."""

    def __init__(self, config: WatchdogConfig, rank: int, world_size: int) -> None:
        self._config, self._rank, self._world_size = config, rank, world_size
        self._usual: dict[str, deque[float]] = {}
        self._beat = _Beat(number=0, iteration=0, phase="start-up", deadline=config.start_s)
        self._beats: dict[int, _Beat] = {}
        self._processes: dict[int, Process] = {}
        self._oom_kills = OomKills()
        self._store: Store | None = None
        self._last_alarm = (0.0, 0.0)  # its seconds, and until when it serves again
        self._is_over = threading.Event()

    def start(self, store: Store) -> None:
        """Watch from now on; main thread only. store: of all ranks, and of nobody else."""
        if not self._config.enabled:
            return
        self._store = store
        process = this_process()
        store.set(f"who/{self._rank}", json.dumps(asdict(process)))
        self._set(f"beat/{self._rank}", _said(self._beat))
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, iteration: int) -> None:
        """The iteration that phases belong to from now on."""
        self._enter(BETWEEN, iteration)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context that is one phase."""
        start = time.monotonic()
        self._enter(name, self._beat.iteration)
        try:
            yield
        finally:
            lasted = self._usual.setdefault(name, deque(maxlen=PHASES_REMEMBERED))
            lasted.append(time.monotonic() - start)
        self._enter(BETWEEN, self._beat.iteration)  # an error leaves the phase that it was in

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which this rank waits for ranks that this same watchdog looks after.

        It has no deadline, as they have theirs.
        """
        before = self._beat
        self._publish(_Beat(number=before.number + 1, iteration=before.iteration, phase=WAITING))
        yield
        again = replace(before, number=before.number + 2, heard=time.monotonic())
        self._publish(again)

    def progress(self) -> None:
        """The phase at hand has come further."""
        if self._store is not None and time.monotonic() > self._beat.heard + SECONDS_OF_A_STEP:
            self._publish(replace(self._beat, steps=self._beat.steps + 1, heard=time.monotonic()))

    @property
    def place(self) -> str:
        """The iteration and the phase at hand."""
        return f"iteration {self._beat.iteration}, {self._beat.phase}"

    def fail(self, text: str, code: int = BROKEN) -> str | None:
        """Tell all ranks why this one ends, and with which exit code, which is then theirs too.

        Where only the connection to another rank broke, that one is given time to say why.

        Returns:
            What to print, with the ranks that do not answer where a connection broke; None where
            another rank had failed before, which says why itself.
        """
        if self._store is None:
            return text
        is_broken = any(part in text for part in COLLATERAL)
        try:
            deadline = time.monotonic() + SECONDS_TO_HEAR_OF_A_FAILURE
            while is_broken and time.monotonic() < deadline:
                if self._has("failed"):
                    return None
                time.sleep(0.1)
            failed = {"text": text, "code": code, "asks": is_broken}
            if not self._first("failed", {"rank": self._rank, **failed}):
                return None
            return text + (self._who_is_silent() if is_broken else "")
        except RuntimeError:
            return text + (f". {STORE_IS_GONE}" if is_broken else "")

    def close(self) -> None:
        """Say that this rank ends as it should."""
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"bye/{self._rank}", "1")

    # -- the main thread -------------------------------------------------------------------------

    def _enter(self, phase: str, iteration: int) -> None:
        number, deadline = self._beat.number + 1, self._deadline(phase)
        self._publish(_Beat(number=number, iteration=iteration, phase=phase, deadline=deadline))

    def _publish(self, beat: _Beat) -> None:
        self._beat = beat
        if self._store is not None:
            # From here and not from the thread, which Python's lock may keep from it.
            with contextlib.suppress(RuntimeError):
                self._set(f"beat/{self._rank}", _said(self._beat))
            self._set_last_alarm(2 * beat.deadline + SECONDS_TO_PRINT)

    def _set_last_alarm(self, seconds: float) -> None:
        """Have a thread in C end this rank then, also while it holds Python's lock.

        A new alarm is a new thread, so one that is younger than a look serves again.
        """
        now = time.monotonic()
        if (seconds, True) == (self._last_alarm[0], now < self._last_alarm[1]):
            return
        self._last_alarm = (seconds, now + SECONDS_BETWEEN_LOOKS)
        if math.isfinite(seconds):
            faulthandler.dump_traceback_later(seconds + SECONDS_BETWEEN_LOOKS, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _deadline(self, phase: str) -> float:
        usual = self._usual.get(phase)
        if phase != BETWEEN and not usual:
            return max(self._config.start_s, self._config.min_s)
        return max(self._config.min_s, self._config.factor * statistics.median(usual or [0.0]))

    # -- the thread ------------------------------------------------------------------------------

    def _watch(self) -> None:
        # The store goes with torchrun, and then there is nobody left to tell.
        with contextlib.suppress(RuntimeError):
            last = time.monotonic()
            while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
                now = time.monotonic()
                if now - last > 20 * SECONDS_BETWEEN_LOOKS:
                    self._beats.clear()  # the machine or the whole job slept, and no phase did
                last = now
                self._leave_with_others()
                self._oom_kills.look()
                if self._has("alarm"):
                    self._answer()
                self._say_if_late()
                if self._rank < 2:
                    self._look()

    def _look(self) -> None:
        """Raise the alarm where a phase of any rank is over its time."""
        late = 0.0 if self._rank == 0 else SECONDS_FOR_ANSWERS  # the second is there for the first
        for rank, said in self._all("beat").items():
            before = self._beats.get(rank)
            if before is None or _said(before) != said:
                self._beats[rank] = _Beat(**said)
        newest = max((beat.heard for beat in self._beats.values()), default=0.0)
        for rank, beat in self._beats.items():
            now = time.monotonic()
            seconds = now - beat.heard
            if seconds < beat.deadline + late or self._has(f"bye/{rank}"):
                continue
            if now - newest > beat.deadline or not self._only_waits(rank, beat):
                alarm = {"by": self._rank, "seconds": seconds, "deadline": beat.deadline}
                if self._first("alarm", alarm):
                    self._answer()

    def _say_if_late(self) -> None:
        """Let readers know whether this rank only waits, where it is over its time."""
        beat = self._beat
        if time.monotonic() - beat.heard > beat.deadline:
            self._set(f"late/{self._rank}", {**_said(beat), "is_waiting": own_stack()[1]})

    def _only_waits(self, rank: int, beat: _Beat) -> bool:
        """True where a rank that is over its time says that it waits, or has had no time to say."""
        if self._has(f"late/{rank}"):
            said = json.loads(self._get(f"late/{rank}"))
            is_waiting = said.pop("is_waiting")
            if said == _said(beat):
                return bool(is_waiting)
        return time.monotonic() - beat.heard < beat.deadline + SECONDS_FOR_ANSWERS

    def _answer(self) -> None:
        """Say where this rank stands, help those that cannot, and leave."""
        stack, is_waiting = own_stack()
        own = {**_said(self._beat), "stack": stack, "is_waiting": is_waiting}
        self._set(f"answer/{self._rank}", own)
        alarm = json.loads(self._get("alarm"))
        time.sleep(SECONDS_FOR_ANSWERS)
        stuck = self._local_without("answer")
        for rank, process in stuck.items():
            beat = self._all("beat").get(rank, _said(self._beat))
            outside = {**beat, "stack": look_at(process), "is_waiting": False}
            self._first(f"answer/{rank}", outside)
        if alarm["by"] == self._rank:
            time.sleep(1.0)  # other machines look at theirs
            _print(_message(alarm, self._all("answer"), self._all("who"), self._world_size))
            self._set("ended", {})
        deadline = time.monotonic() + SECONDS_TO_PRINT
        while not self._has("ended") and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in stuck.values():
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)
        _leave(STUCK)

    def _leave_with_others(self) -> None:
        """End this rank where another one has failed, or is gone without a word."""
        for rank, process in self._local_without("bye").items():
            if rank != self._rank and process.has_ended and not self._has("failed"):
                time.sleep(SECONDS_BETWEEN_LOOKS)
                if self._has(f"bye/{rank}"):
                    continue
                beat = self._all("beat").get(rank, {"iteration": 0, "phase": "start-up"})
                place = f"iteration {beat['iteration']}, {beat['phase']}"
                text = _loss_of(rank, process, place, self._oom_kills.risen())
                failed = {"text": text, "code": BROKEN, "asks": False}
                if self._first("failed", {"rank": rank, **failed}):
                    _print(f"megatron-rl: error: {text}\n")
        if self._has("failed"):
            failed = json.loads(self._get("failed"))
            if failed["rank"] != self._rank:
                self._set(f"heard/{self._rank}", {})
                time.sleep(2 * SECONDS_BETWEEN_LOOKS)  # it prints, and a rank with news of its own
                time.sleep(SECONDS_TO_HEAR_OF_A_FAILURE if failed["asks"] else 0.0)
                _leave(failed["code"])

    def _who_is_silent(self) -> str:
        """The ranks that do not hear of a failure: their machine is lost, for one."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        deadline = time.monotonic() + SECONDS_TO_HEAR_OF_A_FAILURE
        while not self._has(*(f"heard/{rank}" for rank in others)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        heard, who = self._all("heard"), self._all("who")
        by_host: dict[str, list[str]] = {}
        for rank in others:
            if rank not in heard and rank in who:
                by_host.setdefault(who[rank]["host"], []).append(str(rank))
        silent = [f"ranks {', '.join(ranks)} on {host}" for host, ranks in by_host.items()]
        return f". No answer from {'; '.join(silent)}. {LOST}" if silent else ""

    def _local_without(self, kind: str) -> dict[int, Process]:
        """Ranks of this machine that have not set their key of this kind."""
        if len(self._processes) < self._world_size:
            self._processes = {rank: Process(**who) for rank, who in self._all("who").items()}
        return {
            rank: process
            for rank, process in self._processes.items()
            if process.is_here and not self._has(f"{kind}/{rank}")
        }

    # -- the store -------------------------------------------------------------------------------

    def _all(self, kind: str) -> dict[int, dict[str, Any]]:
        """The entries of a kind that are there, by rank."""
        assert self._store is not None
        ranks = range(self._world_size)
        if not self._has(*(f"{kind}/{rank}" for rank in ranks)):
            ranks = [rank for rank in ranks if self._has(f"{kind}/{rank}")]  # type: ignore[assignment]
        found = self._store.multi_get([f"{kind}/{rank}" for rank in ranks])
        return {rank: json.loads(text) for rank, text in zip(ranks, found, strict=True)}

    def _has(self, *keys: str) -> bool:
        assert self._store is not None
        return bool(self._store.check(list(keys)))

    def _get(self, key: str) -> str:
        assert self._store is not None
        return self._store.get(key).decode()

    def _set(self, key: str, value: dict[str, Any]) -> None:
        assert self._store is not None
        self._store.set(key, json.dumps(value))

    def _first(self, key: str, value: dict[str, Any]) -> bool:
        """Set a key that nobody has set; True where it was us."""
        assert self._store is not None
        text = json.dumps({**value, "set_by": self._rank})
        return self._store.compare_set(key, "", text).decode() == text


def _loss_of(rank: int, process: Process, place: str, oom_kill: str | None) -> str:
    """What is said of a rank that ended without a word; oom_kill: the kernel's count of kills."""
    if oom_kill is None:
        return (
            f"rank {rank} (process {process.pid} on {process.host}) is gone: it was killed or "
            f"ended without a word, in {place}. Look for the kernel's out-of-memory killer on that "
            "machine"
        )
    return (
        f"rank {rank} on {process.host} (process {process.pid}) was killed by the kernel, which "
        f"ran out of memory ({oom_kill}), in {place}. {LESS_MEMORY}"
    )


def _said(beat: _Beat) -> dict[str, Any]:
    return {
        "number": beat.number,
        "iteration": beat.iteration,
        "phase": beat.phase,
        "deadline": beat.deadline,
        "steps": beat.steps,
    }


def _message(
    alarm: dict[str, Any],
    answers: dict[int, dict[str, Any]],
    processes: dict[int, dict[str, Any]],
    world_size: int,
) -> str:
    """One message: who stands still and where, who waits, then all stacks."""
    first = min(answer["number"] for answer in answers.values())
    behind = [rank for rank, answer in answers.items() if answer["number"] == first]
    stuck = [rank for rank in behind if not answers[rank]["is_waiting"]] or behind
    silent = [rank for rank in range(world_size) if rank not in answers]
    at = answers[stuck[0]]
    lines = [
        f"megatron-rl: error: the job stands still for {alarm['seconds']:.0f} s in iteration "
        f"{at['iteration']}, {at['phase']} (deadline {alarm['deadline']:.0f} s, by "
        "watchdog.min_s, start_s and factor)"
    ]
    for rank in stuck:
        who = processes[rank]
        place = answers[rank]["stack"][-1] if answers[rank]["stack"] else "nowhere"
        lines.append(f"  stuck: rank {rank}, process {who['pid']} on {who['host']}: {place}")
    waiting = [rank for rank in sorted(answers) if rank not in stuck]
    if waiting:
        lines.append(f"  waiting for it: ranks {', '.join(map(str, waiting))}")
    if silent:
        lines.append(f"  without an answer: ranks {', '.join(map(str, silent))}")
    for rank in (*stuck, *waiting):
        lines.append(f"  stack of rank {rank}, innermost last:")
        lines += [f"    {call}" for call in answers[rank]["stack"]]
    return "\n".join(lines) + "\n"


def _print(text: str) -> None:
    # At once to the descriptor: the main thread may hold the lock of sys.stderr.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


def _leave(code: int) -> None:
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        os.write(sys.__stdout__.fileno(), SHOW_CURSOR)  # a progress display hides it
    note_end(code)
    os._exit(code)
