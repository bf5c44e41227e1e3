"""How far the clocks of the machines of a torchrun job are apart."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_rl.doctor.check import Result, failed, ok, warning

if TYPE_CHECKING:  # torch takes seconds to import, and one machine needs none of it
    from torch._C._distributed_c10d import Store

Clock = Callable[[], float]

ROUNDS = 5
MOST_SECONDS = 1.0  # apart; starts and checkpoints of a run are told apart by their times
REMEDY = "sudo chronyc makestep  # or: sudo systemctl restart systemd-timesyncd"


def num_machines() -> int:
    """Those of this job: agents of torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def check_clock(timeout_s: float = 30.0) -> Result:
    """The first rank of every machine calls it; the first machine's clock is the one to compare."""
    machines = num_machines()
    if machines == 1:
        return ok("one machine")
    from megatron_rl.parallel.groups import store_of_this_attempt

    store = store_of_this_attempt("doctor")
    store.set_timeout(timedelta(seconds=timeout_s))
    machine = int(os.environ["GROUP_RANK"])
    if machine == 0:
        return _judged(serve(store, machines), "all others")
    return _judged([ask(store, machine)], "the first")


def serve(store: "Store", machines: int, now: Clock = time.time) -> list[float]:
    """Tell all other machines this one's time; returns how far each is ahead, in seconds."""
    for machine in range(1, machines):
        for number in range(ROUNDS):
            store.get(f"ask/{machine}/{number}")  # waits for it
            store.set(f"answer/{machine}/{number}", str(now()))
    return [float(store.get(f"ahead/{machine}")) for machine in range(1, machines)]


def ask(store: "Store", machine: int, now: Clock = time.time) -> float:
    """Seconds by which this machine is ahead of the first, by the quickest answer."""
    answers = []
    for number in range(ROUNDS):
        sent = now()
        store.set(f"ask/{machine}/{number}", "1")
        theirs = float(store.get(f"answer/{machine}/{number}"))
        received = now()
        answers.append((received - sent, (sent + received) / 2 - theirs))
    ahead = min(answers)[1]
    store.set(f"ahead/{machine}", str(ahead))
    return ahead


def _judged(ahead: list[float], whom: str) -> Result:
    most = max(ahead, key=abs)
    text = f"at most {abs(most):.3f} s apart from {whom} of {num_machines()} machines"
    if abs(most) > 60 * MOST_SECONDS:
        return failed(text, REMEDY)
    return warning(text, REMEDY) if abs(most) > MOST_SECONDS else ok(text)
