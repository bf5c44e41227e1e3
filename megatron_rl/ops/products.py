"""Products of float32 matrices on a CPU, by the library that is faster there.

torch multiplies them by MKL, which has no AVX-512 code for an AMD processor; oneDNN, which torch
has as well, has. That doubles the speed of a core whose AVX-512 units are whole (Zen 5), and helps
large products a little where they are halves (Zen 4): docs/kernels.md. Which one runs depends on
the processor and the shapes alone, so a run that goes on has the same bits.
"""

import functools
import math
from pathlib import Path

import torch
from torch import Tensor

NEVER = math.inf
NOWHERE = (NEVER, NEVER)
LEAST_PRODUCTS = {25: (12e6, NEVER), 26: (1.5e6, 1.5e6)}
"""By the family of an AMD processor: the multiplications of a call from which on it goes to oneDNN,
and those where the left factor is transposed, which oneDNN copies first. Below, what it costs to
prepare one is more than it saves."""
LEAST_ANYWHERE = min(min(least) for least in LEAST_PRODUCTS.values())


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
        and left.numel() * right.size(1) >= LEAST_ANYWHERE
        and left.numel() * right.size(1) >= least_here()[left.stride(-1) != 1]
        and (right.is_contiguous() or right.t().is_contiguous())
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
    )


@functools.cache
def least_here() -> tuple[float, float]:
    """LEAST_PRODUCTS of this processor."""
    maker, family = _processor()
    has_it = (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and maker == "AuthenticAMD"
    )
    return LEAST_PRODUCTS.get(min(family, max(LEAST_PRODUCTS)), NOWHERE) if has_it else NOWHERE


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, int]:
    """Its maker and family, as it says; nothing and 0 where the system does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "", 0
    told = {name.strip(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
    return told.get("vendor_id", ""), int(told.get("cpu family", "0"))
