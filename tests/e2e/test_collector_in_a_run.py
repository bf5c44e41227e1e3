"""Python's garbage collector looks seldom while a run starts, and as usual while it trains."""

import gc
import subprocess

import pytest

from megatron_rl.collector import SELDOM

pytestmark = pytest.mark.slow

WATCHED = """
import gc, sys
from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import detect

enter(detect())  # before the first import of megatron.core
import megatron_rl.loop as loop
import megatron_rl.session as session
from megatron_rl.commands.main import main

def watched(name, function):
    def call(*arguments):
        print(name, gc.get_threshold())
        return function(*arguments)
    return call

session.read_inputs = watched("inputs", session.read_inputs)
loop.run_iteration = watched("iteration", loop.run_iteration)
sys.exit(main())
"""


def test_it_looks_seldom_until_the_first_iteration(runs):
    done = runs.start(
        "train",
        "collector",
        1,
        "run.num_iterations=2",
        stderr=subprocess.STDOUT,
        program=("-c", WATCHED),
    )
    assert done.returncode == 0, done.stdout
    told = [
        line for line in done.stdout.splitlines() if line.startswith(("inputs (", "iteration ("))
    ]
    usual = f"iteration {gc.get_threshold()}"
    assert told == [f"inputs {SELDOM}", usual, usual]
