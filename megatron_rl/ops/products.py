"""Products of float32 matrices on a CPU, by the library that is faster there.

torch multiplies them by MKL, which leaves half of an AMD processor idle that has AVX-512: 100
GFLOP/s of a core, where oneDNN, which torch has as well, reaches 200 to 250 (docs/kernels.md).
Which one runs depends on the processor and the shapes alone, so a run that goes on has the same
bits.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

LEAST_PRODUCTS = 1_500_000
"""Of a call that goes to oneDNN: below it, what it costs to prepare one is more than it saves."""


def product(left: Tensor, right: Tensor, memory: Tensor | None = None) -> Tensor:
    """left [..., K] @ right [K, N], without a gradient of its own; memory: may hold the result."""
    if not goes_to_onednn(left, right):
        return torch.matmul(left, right, out=memory)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return found


def goes_to_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and right.dim() == 2
        and left.numel() * right.size(1) >= LEAST_PRODUCTS
        and (right.is_contiguous() or right.t().is_contiguous())
        and is_faster_here()
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
    )


@functools.cache
def is_faster_here() -> bool:
    """True on processors that have AVX-512 and are not Intel's."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _maker() not in ("", "GenuineIntel")
    )


def _maker(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's, as it says; nothing where the system does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
