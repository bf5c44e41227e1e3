"""A GPU that is not there: a device whose tensors have shapes and sizes, and no numbers.

torch lets a program register a device of its own kind (PrivateUse1). Tensors of it are made in a
FakeTensorMode, so that every op computes shapes alone; one that is given tensors of two devices
fails, as it does on a GPU.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from megatron_rl.errors import InputError
from megatron_rl.platforms.base import Platform

NAME = "rehearsal"


@dataclass(frozen=True, kw_only=True)
class Rehearsed(Platform):
    """The platform of a rank that is rehearsed: it takes every path of a GPU."""

    def current_device(self) -> torch.device:
        return torch.device(NAME, 0)

    def bind_rank(self, local_rank: int) -> None:
        return None

    def peak_memory_bytes(self) -> int:
        return 0

    def synchronize(self) -> None:
        return None

    def give_back_device_memory(self) -> None:
        return None


@functools.cache
def register() -> Rehearsed:
    """Make the device known to torch; once in a process, which then rehearses and nothing else.

    Raises:
        InputError: this version of torch has no such devices.
    """
    from torch.utils import _foreach_utils, backend_registration

    set_up = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if set_up is None:
        raise InputError(
            f"--rehearse: torch {torch.__version__} cannot have devices that are written in "
            "Python. Use torch 2.13, or leave --rehearse out"
        )
    set_up(NAME)
    # torch.amp asks for it, even where nothing is cast.
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    # What torch has one kernel for on a GPU, and takes apart on a device that it does not know.
    vars(functional)["scaled_dot_product_attention"] = _attention
    vars(functional)["rms_norm"] = _norm
    vars(functional)["silu"] = _silu
    torch.tensor = _by_way_of_the_host(torch.tensor)
    # As on a GPU, Adam takes all parameters at once, whose intermediate results take memory.
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    return Rehearsed(device_type="cuda", collective_backend="fake")


def _by_way_of_the_host(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which writes numbers and so needs memory."""

    @functools.wraps(stock)
    def tensor(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
        if isinstance(data, list | tuple):  # of tensors, maybe
            data = tree_map_only(Tensor, Tensor.item, data)
        made = stock(data, device="cpu", **settings)
        return made if device is None else made.to(device)

    return tensor


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None,
    enable_gqa: bool = False,
) -> Tensor:
    """Causal attention as a GPU has it; for a device that torch does not know it would have none.

    By flash attention, or where numbers have more than 16 bits, or a mask is added to the scores,
    by the memory-efficient one.
    """
    if enable_gqa:
        repeats = query.size(1) // key.size(1)
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if query.element_size() == 2 and attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        attended, *_ = flash(query, key, value, 0.0, is_causal, scale=scale)
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        keeps = torch.is_grad_enabled()
        bias = attn_mask
        if bias is not None:
            bias = bias.expand(query.size(0), query.size(1), query.size(2), key.size(2))
        attended, *_ = efficient(query, key, value, bias, keeps, 0.0, is_causal, scale=scale)
    assert isinstance(attended, Tensor)
    return attended


def _norm(
    values: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    normed: Tensor = _Norm.apply(values, weight)
    return normed


class _Norm(torch.autograd.Function):
    """An RMSNorm that keeps its input and one number a row, and nothing in between."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        scales = values.new_empty((*values.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(values, weight, scales)
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), torch.empty_like(weight)


def _silu(values: Tensor, inplace: bool = False) -> Tensor:
    activated: Tensor = _Silu.apply(values)
    return activated


class _Silu(torch.autograd.Function):
    """An activation that keeps its input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(gradients[0])
