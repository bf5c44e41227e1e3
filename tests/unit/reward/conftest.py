from collections.abc import Callable, Iterator

import pytest
from reward_helpers import time_limit

from megatron_rl.reward.pool import WorkerPool


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    with time_limit():
        yield


@pytest.fixture
def make_pool() -> Iterator[Callable[..., WorkerPool]]:
    pools = []

    def make(function: str | None = None, **limits: float) -> WorkerPool:
        settings = {"num_workers": 1, "deadline_s": 1.0, "memory_bytes": 1 << 30} | limits
        pools.append(WorkerPool(function=function, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
