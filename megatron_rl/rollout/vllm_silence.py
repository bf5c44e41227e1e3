"""What vLLM says in C++ whenever it builds an engine, and what asks nothing of a user."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_rl.metrics.unsaid import unsaid

SAID = b"NUMA binding: "
"""On a CPU: which memory the process is bound to. torch writes it to the descriptor, by no logger
and no warning of Python's."""


@contextmanager
def quiet_binding() -> Iterator[None]:
    """A context in which vLLM's workers bind their memory without a word."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    ops: Any = torch.ops._C
    stock = getattr(ops, "init_cpu_memory_env", None)
    if stock is None:  # only the build for CPUs has it
        yield
        return

    def quietly(nodes: list[int]) -> None:
        with unsaid(SAID):
            stock(nodes)

    ops.init_cpu_memory_env = quietly
    try:
        yield
    finally:
        ops.init_cpu_memory_env = stock
