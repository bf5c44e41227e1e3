"""Time and memory of a call on a CPU or a GPU."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class Device:
    """How to measure on one kind of device."""

    def __init__(self, kind: str) -> None:
        self.is_gpu = kind == "cuda"

    def milliseconds(self, call: Callable[[], Tensor]) -> tuple[float, float]:
        """Until it is done, and of processors: the same on a CPU that does nothing else."""
        if not self.is_gpu:
            start, used = time.perf_counter(), time.process_time()
            call()
            return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - used)
        used = time.process_time()
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)), 1e3 * (time.process_time() - used)

    def peak_extra_mib(self, call: Callable[[], Tensor]) -> float:
        """Most memory held during the call, less what was held before."""
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status_kib("VmRSS")
        call()
        return (_status_kib("VmHWM") - before) / 2**10


def describe_machine(kind: str) -> dict[str, str]:
    """What a reader needs to judge the numbers."""
    told = {"torch": torch.__version__}
    if kind == "cuda":
        return told | {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return told | {
        "device": f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads",
        "load before": load_average(),
    }


def load_average() -> str:
    """Processes that run or wait, on average over 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
