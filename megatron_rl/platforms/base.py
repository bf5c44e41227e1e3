"""The device of this process: chosen once at start-up and passed on; nobody else asks for it."""

import os
import random
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_rl.errors import InputError
from megatron_rl.platforms import host_memory

# A CPU's large tensors are fresh memory every time, and by pages of 4 KiB that takes several times
# as long as writing to it. torch looks for this when it allocates for the first time.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

ALLOCATIONS_KEPT = 100_000  # of a memory history, the newest


@dataclass(frozen=True, kw_only=True)
class Platform:
    """One kind of device."""

    device_type: str
    """Type of torch.device: "cuda" or "cpu"."""

    collective_backend: str
    """Backend for init_process_group; CPU tensors always have one."""

    @property
    def host_backend(self) -> str:
        """Backend of groups for CPU tensors and objects alone."""
        return self.collective_backend if self.device_type == "cpu" else "gloo"

    def current_device(self) -> torch.device:
        """The device of this rank."""
        if self.device_type == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def bind_rank(self, local_rank: int) -> None:
        """Make local_rank's device the current one."""
        if self.device_type == "cuda":
            torch.cuda.set_device(local_rank)

    def peak_memory_bytes(self) -> int:
        """Largest amount of device memory this process has held (resident memory on a CPU)."""
        if self.device_type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

    def total_memory_bytes(self) -> int:
        """Memory of this rank's device; on a CPU that of the machine, which its ranks share."""
        if self.device_type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            return int(torch.cuda.get_device_properties(local_rank).total_memory)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def free_memory_bytes(self) -> int | None:
        """Memory of this rank's device that is free; on a CPU for all of its ranks together.

        None: nothing says it.
        """
        if self.device_type == "cuda":
            return int(torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0])
        return host_memory.available_bytes()

    def used_memory_bytes(self) -> int:
        """Memory of this rank's device that is in use, by all that it runs; on a CPU what this
        process holds.

        torch's own count would have the memory of an engine that sleeps, too.
        """
        if self.device_type == "cuda":
            free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
            return int(total - free)
        return host_memory.own_bytes()

    def most_ranks(self) -> int:
        """Ranks that this machine can have: one for each GPU, or for each core of a CPU."""
        if self.device_type == "cuda":
            return int(torch.cuda.device_count())
        return os.cpu_count() or 1

    @contextmanager
    def memory_history(self, file: Path) -> Iterator[None]:
        """Record the allocations inside, and write them to file where they exhaust the device.

        Nothing is done on a CPU, whose kernel ends a process without asking.
        """
        if self.device_type != "cuda":
            yield
            return
        torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS_KEPT)
        try:
            yield
        except torch.OutOfMemoryError as error:
            with suppress(OSError):  # the error itself matters more
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(file))
                error.add_note(f"the allocations before it: {file}")
            raise
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def give_back_memory(self) -> None:
        """Give back host memory that was freed; on a CPU activations have left much of it."""
        if self.device_type == "cpu":
            host_memory.give_back()

    def give_back_device_memory(self) -> None:
        """Give a GPU's freed memory back, for an engine that does not take it from torch."""
        if self.device_type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device, so that a timer measures work and not its launch."""
        if self.device_type == "cuda":
            torch.cuda.synchronize()

    def rng_state(self) -> dict[str, object]:
        """States of every global generator this process draws from."""
        states: dict[str, object] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        if self.device_type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return states

    def set_rng_state(self, states: dict[str, object]) -> None:
        """Restore what rng_state returned."""
        random.setstate(states["python"])  # type: ignore[arg-type]
        np.random.set_state(states["numpy"])  # type: ignore[arg-type]
        torch.set_rng_state(states["torch"])  # type: ignore[arg-type]
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])  # type: ignore[arg-type]

    @contextmanager
    def preserved_rng(self) -> Iterator[None]:
        """Run foreign code (an engine) that draws from the global generators, and undo that."""
        states = self.rng_state()
        try:
            yield
        finally:
            self.set_rng_state(states)


CUDA = Platform(device_type="cuda", collective_backend="cpu:gloo,cuda:nccl")
CPU = Platform(device_type="cpu", collective_backend="shared_memory")


def detect() -> Platform:
    """CUDA where torch has a device, else CPU; MEGATRON_RL_DEVICE=cpu|cuda decides by hand.

    Raises:
        InputError: it names anything else.
    """
    wanted = os.environ.get("MEGATRON_RL_DEVICE")
    if not wanted:
        return CUDA if torch.cuda.is_available() else CPU
    for platform in (CPU, CUDA):
        if platform.device_type == wanted:
            return platform
    raise InputError(
        f"MEGATRON_RL_DEVICE={wanted!r}: must be cpu or cuda. Unset it to take CUDA where torch "
        "has a device, else the CPU"
    )
