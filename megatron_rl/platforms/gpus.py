"""The GPUs of this machine, as torch sees them and as their driver does."""

import shutil
import subprocess
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU that this process may use."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: str  # "9.0"


def visible_gpus() -> list[Gpu]:
    """The GPUs that torch can use, none where it has no CUDA or cannot reach the driver."""
    if not torch.cuda.is_available():
        return []
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def why_none() -> str:
    """What torch says where it is asked for a GPU and has none."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "torch gives no reason"


def seen_by_driver() -> tuple[list[str], str] | None:
    """(names of the GPUs, version of the driver) by nvidia-smi; None where it is not there.

    Raises:
        OSError, subprocess.SubprocessError: it is there, and fails or hangs.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = ["--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run([program, *query], capture_output=True, text=True, timeout=20, check=True)
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return [name.strip() for name, _ in rows], rows[0][1].strip() if rows else ""


def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{found.major}.{found.minor}"
    return Gpu(name=found.name, total_bytes=total, free_bytes=free, capability=capability)
