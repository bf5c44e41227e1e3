"""`megatron-rl train` with a fault on rank 1 in the third iteration; torchrun starts it.

python faulty_train.py FAULT PLACE train RECIPE ...
"""

import importlib
import os
import signal
import sys
import time
from typing import Any

from megatron_rl.commands.main import main

PLACES = {
    "rollout": ("megatron_rl.rollout.gold", "GoldRollouts", "generate"),
    "update": ("megatron_rl.policy.trainer", "Trainer", "update"),
    "checkpoint": ("megatron_rl.checkpoint.store", "CheckpointStore", "_write"),
}


def sleeps() -> None:
    time.sleep(1000)


def computes() -> None:
    sum(range(10**12))  # one call in C, which keeps Python's lock


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raises() -> None:
    raise KeyError("a row that is not there")


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install(fault: str, place: str) -> None:
    """Patch the method when its module has been imported, which must not happen early."""
    module, owner, method = PLACES[place]
    wanted = {"calls": 0}

    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name != "megatron_rl.loop":  # the last one that a session imports
                return
            sys.meta_path.remove(self)
            kind = getattr(importlib.import_module(module), owner)
            stock = getattr(kind, method)

            def faulty(*args: Any, **kwargs: Any) -> Any:
                wanted["calls"] += 1
                if wanted["calls"] == 3:
                    globals()[fault]()
                return stock(*args, **kwargs)

            setattr(kind, method, faulty)

    sys.meta_path.insert(0, Finder())


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        install(sys.argv[1], sys.argv[2])
    sys.exit(main(sys.argv[3:]))
