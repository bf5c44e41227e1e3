"""The GPUs of this machine, or that there are none."""

import os
import subprocess
from collections import Counter
from collections.abc import Sequence

import torch

from megatron_rl.doctor.check import Result, failed, ok, warning
from megatron_rl.platforms.gpus import Gpu, seen_by_driver, visible_gpus, why_none

GIB = 1 << 30
CPU_ONLY = "none, CPU run"
ON_CPU = "MEGATRON_RL_DEVICE=cpu megatron-rl doctor  # a run on the CPU"


def check_gpus() -> Result:
    wanted = os.environ.get("MEGATRON_RL_DEVICE")
    if wanted == "cpu":
        return ok("not looked for, MEGATRON_RL_DEVICE=cpu")
    try:
        seen = seen_by_driver()
    except (OSError, subprocess.SubprocessError) as error:
        return failed(f"nvidia-smi fails: {error}", f"nvidia-smi  # and {ON_CPU}")
    if gpus := visible_gpus():
        return _of(gpus, seen[1] if seen else "unknown")
    if seen is None or not seen[0]:
        if wanted == "cuda":
            return failed("none, and MEGATRON_RL_DEVICE=cuda", "unset MEGATRON_RL_DEVICE")
        return ok(CPU_ONLY)
    names, driver = seen
    there = f"{len(names)} x {names[0]}, driver {driver}, which torch cannot use"
    if torch.version.cuda is None:
        return warning(f"{there}: its build is for a CPU", "MEGATRON_RL_DEVICE=cuda make install")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return warning(f"{there}: CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES")
    return failed(f"{there} (build for CUDA {torch.version.cuda}): {why_none()}", ON_CPU)


def _of(gpus: Sequence[Gpu], driver: str) -> Result:
    kinds = Counter((gpu.name, gpu.total_bytes // GIB, gpu.capability) for gpu in gpus)
    named = "; ".join(
        f"{count} x {name}, {gib} GiB, compute {capability}"
        for (name, gib, capability), count in kinds.items()
    )
    text = f"{named}; driver {driver}"
    busy = [index for index, gpu in enumerate(gpus) if gpu.free_bytes < 0.8 * gpu.total_bytes]
    if busy:
        least = min(gpus[index].free_bytes for index in busy) / GIB
        in_use = f"others use GPU {', '.join(map(str, busy))}, down to {least:.1f} GiB free"
        return warning(f"{text}; {in_use}", "nvidia-smi  # and end what is not needed")
    return ok(text)
