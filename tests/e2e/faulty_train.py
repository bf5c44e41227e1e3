"""`megatron-rl train` with a fault on rank 1 in the third iteration; torchrun starts it.

python faulty_train.py FAULT PLACE MOMENT train RECIPE ...

MOMENT is a file that is made when the fault strikes.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from megatron_rl.commands.main import main

PLACES = {  # the phases of an iteration, and an engine's step in the middle of one
    "rollout": ("megatron_rl.rollout.gold", "GoldRollouts", "generate"),
    "engine step": ("vllm.v1.engine.llm_engine", "LLMEngine", "step"),
    "reward": ("megatron_rl.rollout.sampled", "SampledRollouts", "grade"),
    "logprob": ("megatron_rl.policy.trainer", "Trainer", "add_logprobs"),
    "update": ("megatron_rl.policy.trainer", "Trainer", "update"),
    "weight_sync": ("megatron_rl.weights.sync", "WeightSync", "push"),
    "evaluation": ("megatron_rl.rollout.sampled", "SampledRollouts", "evaluate"),
    "checkpoint": ("megatron_rl.checkpoint.save", "Save", "_write"),
}


def sleeps() -> None:
    time.sleep(1000)


def computes() -> None:
    sum(range(10**12))  # one call in C, which keeps Python's lock


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def raises() -> None:
    raise KeyError("a row that is not there")


def is_told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install(fault: str, place: str, moment: Path) -> None:
    """Patch the method when its module has been imported, which must not happen early."""
    iteration = 0

    def patch(owner: Any, name: str, before: Any) -> None:
        stock = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            before(*args)
            return stock(*args, **kwargs)

        setattr(owner, name, patched)

    def note(_: Any, begun: int) -> None:
        nonlocal iteration
        iteration = begun

    def strike(*_: Any) -> None:
        if iteration == 3:
            moment.touch()
            globals()[fault]()

    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name != "megatron_rl.loop":  # the last one that a session imports
                return
            sys.meta_path.remove(self)
            module, owner, method = PLACES[place]
            patch(getattr(importlib.import_module(module), owner), method, strike)
            patch(importlib.import_module("megatron_rl.metrics.meter").Meter, "begin", note)

    sys.meta_path.insert(0, Finder())


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        install(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
