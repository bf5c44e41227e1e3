"""The compiled extension of csrc/: whether it is there, decided once at import, and for what.

Its ops are torch.ops.megatron_rl.*; what each must equal is the definition beside its wrapper.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from megatron_rl.ops.loss_spec import EXTREMA, SUMS

FAULT = "" if importlib.util.find_spec("megatron_rl._C") else "it was not compiled"
"""Why there are no native ops; empty where there are."""

if not FAULT:
    try:
        import megatron_rl._C  # noqa: F401  (registers torch.ops.megatron_rl)
    except ImportError as error:  # compiled for a torch that is no longer here
        FAULT = f"it cannot be loaded: {error}"

OPS = (
    "row_stats",
    "merge_stats",
    "token_loss",
    "dlogits_",
    "dlogits",
    "policy_loss_onepass_",
    "rescale_if_",
    "group_stats",
    "draw_stats",
    "shared_open",
)
LAYER_OPS = (
    "turn",
    "swiglu",
    "swiglu_backward",
    "rms_norm",
    "rms_norm_backward",
    "attend_next_",
    "draw_from_head",
    "multiply_",
)
"""Those that are for float32 on CPUs alone."""
if not FAULT and (
    missing := [op for op in (*OPS, *LAYER_OPS) if not hasattr(torch.ops.megatron_rl, op)]
):
    FAULT = f"it was compiled from other sources, without {', '.join(missing)}"

BUILT = not FAULT

_COMPILED = {
    device: frozenset(
        op
        for op in OPS
        if BUILT and torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_rl::{op}", key)
    )
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
}

CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of logits that the ops take, on a CPU and elsewhere."""


def take_as_compiled(device_type: str) -> None:
    """Take the ops to be there for a device that computes shapes alone."""
    if BUILT:
        _COMPILED[device_type] = frozenset(OPS)


def devices() -> tuple[str, ...]:
    """The kinds of devices that ops were compiled for: "cpu", "cuda"."""
    return tuple(kind for kind, ops in _COMPILED.items() if ops)


def has(op: str, device: torch.device) -> bool:
    """True where op was compiled for this kind of device."""
    return op in _COMPILED.get(device.type, ())


def takes(op: str, tensor: Tensor) -> bool:
    """True where op was compiled for the device and dtype of this tensor."""
    dtypes = CPU_DTYPES if tensor.device.type == "cpu" else DEVICE_DTYPES
    return tensor.dtype in dtypes and has(op, tensor.device)


def has_layers_for(tensor: Tensor) -> bool:
    """True where LAYER_OPS take this tensor."""
    return BUILT and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


@functools.cache
def has_wide_vectors() -> bool:
    """True where the ops compute with AVX-512."""
    asked_for = os.environ.get("MEGATRON_RL_CPU_ISA") or "avx512"
    return asked_for == "avx512" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


if BUILT:
    # Shapes and dtypes of results, which torch.compile and export ask for without computing any.

    @torch.library.register_fake("megatron_rl::row_stats")
    def _row_stats(logits: Tensor, targets: Tensor, *rest: object) -> Tensor:
        return logits.new_empty((logits.shape[0], 4), dtype=_compute_dtype(logits))

    @torch.library.register_fake("megatron_rl::draw_stats")
    def _draw_stats(logits: Tensor, *rest: object) -> Tensor:
        return logits.new_empty((logits.shape[0], 5), dtype=torch.float64)

    @torch.library.register_fake("megatron_rl::merge_stats")
    def _merge_stats(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = stats.shape[1]
        return stats.new_empty(rows), stats.new_empty(rows), stats.new_empty(rows)

    @torch.library.register_fake("megatron_rl::token_loss")
    def _token_loss(stats: Tensor, *rest: object) -> tuple[Tensor, ...]:
        rows = stats.shape[1]
        logprobs, loss, totals = _loss_results(stats, rows, stats.dtype)
        return logprobs, torch.empty_like(logprobs), stats.new_empty(rows, 4), loss, *totals

    @torch.library.register_fake("megatron_rl::policy_loss_onepass_")
    def _policy_loss_onepass_(logits: Tensor, *rest: object) -> tuple[Tensor, ...]:
        logprobs, loss, totals = _loss_results(logits, logits.shape[0], _compute_dtype(logits))
        return logprobs, torch.empty_like(logprobs), loss, *totals

    @torch.library.register_fake("megatron_rl::dlogits_")
    def _dlogits_(logits: Tensor, *rest: object) -> None:
        return None

    @torch.library.register_fake("megatron_rl::dlogits")
    def _dlogits(logits: Tensor, *rest: object) -> Tensor:
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("megatron_rl::rescale_if_")
    def _rescale_if_(x: Tensor, grad: Tensor, expected: float) -> None:
        return None

    @torch.library.register_fake("megatron_rl::group_stats")
    def _group_stats(rewards: Tensor, offsets: Tensor, *rest: object) -> tuple[Tensor, ...]:
        groups = offsets.shape[0] - 1
        return (
            *(rewards.new_empty(groups) for _ in range(4)),
            offsets.new_empty(groups),
            rewards.new_empty((5, groups), dtype=torch.bool),
            rewards.new_empty(rewards.shape, dtype=torch.bool),
            rewards.new_empty(rewards.shape),
        )

    @torch.library.register_fake("megatron_rl::draw_from_head")
    def _draw_from_head(hidden: Tensor, *rest: object) -> Tensor:
        return hidden.new_empty((hidden.shape[0], 5), dtype=torch.float64)

    @torch.library.register_fake("megatron_rl::multiply_")
    def _multiply_(left: Tensor, right: Tensor, out: Tensor, adds: bool) -> None:
        return None

    @torch.library.register_fake("megatron_rl::turn")
    def _turn(heads: Tensor, *rest: object) -> Tensor:
        return heads.new_empty(heads.shape)

    @torch.library.register_fake("megatron_rl::swiglu")
    def _swiglu(x: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    @torch.library.register_fake("megatron_rl::swiglu_backward")
    def _swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("megatron_rl::rms_norm")
    def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.numel() // weight.shape[0])

    @torch.library.register_fake("megatron_rl::rms_norm_backward")
    def _rms_norm_backward(grad: Tensor, x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape[-1])

    @torch.library.register_fake("megatron_rl::attend_next_")
    def _attend_next_(query: Tensor, *rest: object) -> Tensor:
        rows, heads, size = query.shape
        return query.new_empty(rows, heads * size)


def _loss_results(
    like: Tensor, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    totals = (
        like.new_empty(len(SUMS), dtype=torch.float64),
        like.new_empty(len(EXTREMA), dtype=torch.float64),
    )
    return like.new_empty(rows, dtype=dtype), like.new_empty((), dtype=dtype), totals
