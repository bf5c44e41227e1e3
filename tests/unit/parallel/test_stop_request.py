import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_rl.parallel.groups import init_distributed
from megatron_rl.parallel.stop import StopRequest, seconds_to_stop
from megatron_rl.platforms.base import CPU


@pytest.fixture
def group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    stock = signal.getsignal(signal.SIGTERM)
    init_distributed(CPU)
    yield dist.group.WORLD
    dist.destroy_process_group()
    signal.signal(signal.SIGTERM, stock)


def test_sigterm_is_noted_and_nothing_is_interrupted(group):
    stop = StopRequest()
    stop.listen()
    assert not stop.agreed(group)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # a scheduler and torchrun both pass it on
    assert stop.agreed(group)


@pytest.mark.parametrize(
    ("arguments", "variable", "seconds"),
    [
        ([], None, 30.0),  # torchrun's own default
        ([], "90", 90.0),
        (["--shutdown-timeout", "540", "-m", "megatron_rl"], "90", 540.0),
        (["--shutdown_timeout=120", "-m", "megatron_rl"], None, 120.0),
        (["--shutdown-timeout"], "soon", 30.0),  # it would refuse both
    ],
)
def test_the_time_that_torchrun_gives_is_read_from_its_command_line(
    monkeypatch, arguments, variable, seconds
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    if variable is not None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", variable)
    wait = [sys.executable, "-c", "print(flush=True); input()", *arguments]
    with subprocess.Popen(wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        launcher.stdout.readline()  # its command line is its own by now
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        assert seconds_to_stop() == seconds
        launcher.stdin.close()


RANK = """
import os, sys, time
launcher = int(sys.argv[1])
from megatron_rl.parallel.stop import follow_launcher
while sys.argv[2] == "dies" and os.getppid() == launcher:
    time.sleep(0.01)
print("follows", flush=True)
follow_launcher()
print("goes on", flush=True)
"""
LAUNCHER = """
import os, subprocess, sys
if sys.argv[2] == "lives":
    import torch
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
sys.exit(rank.wait() if sys.argv[2] == "lives" else 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel has no such signal")
@pytest.mark.parametrize(("fate", "said"), [("lives", "follows goes on"), ("dies", "follows")])
def test_a_rank_whose_launcher_died_while_it_imported_ends_too(fate, said):
    """The other parent that it then has is no launcher, however long that lives."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, RANK, fate],
        env=os.environ | {"TORCHELASTIC_RUN_ID": "1"},
        stdout=subprocess.PIPE,  # open until the rank has ended
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == said.split()


def test_without_torchrun_nobody_kills(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert seconds_to_stop() is None
