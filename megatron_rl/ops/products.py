"""Products of float32 matrices on a CPU, by what is fastest there.

torch multiplies them by MKL, which has no AVX-512 code for an AMD processor. oneDNN, which torch
has as well, has, and so does multiply_ of csrc/product, which puts its result where memory is and
adds to it: docs/kernels.md. Which one runs depends on the processor, the shapes and `ops.backend`
alone, so a run that goes on has the same bits.
"""

import functools
import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megatron_rl.ops import native
from megatron_rl.ops.fused_layers import run_natively

Library = Literal["native", "onednn", "torch"]

NEVER = math.inf


class Least(NamedTuple):
    """The multiplications of a call from which on a library takes it: below, what it costs to
    prepare one is more than it saves.
    """

    native: float
    onednn: float
    onednn_transposed: float  # the left factor, which oneDNN copies first


NOWHERE = Least(NEVER, NEVER, NEVER)
LEAST_PRODUCTS = {25: Least(4e5, NEVER, NEVER), 26: Least(NEVER, 1.5e6, 1.5e6)}
"""By the family of an AMD processor. multiply_ was not measured on the second."""
LEAST_ANYWHERE = min(min(least) for least in LEAST_PRODUCTS.values())

LARGE_BYTES = 1 << 25
"""A result of so many bytes is fresh memory from the system, whatever was freed before: glibc gives
tensors from here on a mapping of their own."""
BLOCK_ELEMENTS = 1 << 21  # of a result that is copied: it stays in a cache


def product(left: Tensor, right: Tensor, memory: Tensor | None = None) -> Tensor:
    """left [..., K] @ right [K, N], without a gradient of its own.

    memory: of a left [M, K]; may hold the result, and does if it is large.
    """
    library = library_of(left, right)
    if library == "torch":
        return torch.matmul(left, right, out=memory)
    if library == "native":
        rows = left.reshape(-1, left.size(-1))
        out = left.new_empty(len(rows), right.size(1)) if memory is None else memory
        torch.ops.megatron_rl.multiply_(rows, right, out, False)
        return out.view(*left.shape[:-1], right.size(1))
    if memory is None or memory.nbytes < LARGE_BYTES:
        return _by_onednn(left, right)
    size = max(1, BLOCK_ELEMENTS // len(left))
    for to, columns in zip(memory.split(size, dim=1), right.split(size, dim=1), strict=True):
        to.copy_(_by_onednn(left, columns))
    return memory


def add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrites: bool = False) -> None:
    """Add left [M, K] @ right [K, N] to total [M, N] of their dtype, or write it there."""
    if library_of(left, right) == "native":
        torch.ops.megatron_rl.multiply_(left, right, total, not overwrites)
    else:
        total.addmm_(left, right, beta=0 if overwrites else 1)


def library_of(left: Tensor, right: Tensor) -> Library:
    """What multiplies these."""
    if not (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and right.dim() == 2
        and left.numel() * right.size(1) >= LEAST_ANYWHERE
        and (right.is_contiguous() or right.t().is_contiguous())
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
    ):
        return "torch"
    least, count = least_here(), left.numel() * right.size(1)
    is_transposed = left.stride(-1) != 1
    if count >= least.native and native.has_wide_vectors() and run_natively(left, right):
        is_dense = left.dim() == 2 and left.stride(0) == 1 if is_transposed else True
        return "native" if is_dense else "torch"
    return "onednn" if count >= least[1 + is_transposed] else "torch"


@functools.cache
def least_here() -> Least:
    """LEAST_PRODUCTS of this processor."""
    maker, family = _processor()
    has_it = (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and maker == "AuthenticAMD"
    )
    return LEAST_PRODUCTS.get(min(family, max(LEAST_PRODUCTS)), NOWHERE) if has_it else NOWHERE


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return found


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, int]:
    """Its maker and family, as it says; nothing and 0 where the system does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "", 0
    told = {name.strip(): value.strip() for name, _, value in (one.partition(":") for one in lines)}
    return told.get("vendor_id", ""), int(told.get("cpu family", "0"))
