import os
import signal

import pytest
import torch.distributed as dist

from megatron_rl.parallel.groups import init_distributed
from megatron_rl.parallel.stop import StopRequest
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
