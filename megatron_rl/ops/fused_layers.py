"""Parts of a layer in one pass each, for float32 on a CPU: norm, SwiGLU, rope, and the attention of
next tokens.

torch computes them there by several passes over memory, which takes longer than the products of a
small model do. On a GPU Transformer Engine has them. Beside each is its definition in torch, which
runs for other dtypes and devices, and where `ops.backend` asks for it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.ops import backend, native


def run_natively(*tensors: Tensor) -> bool:
    """True where the ops below have kernels for all of these tensors."""
    return backend.chosen() != "reference" and all(map(native.has_layers_for, tensors))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., H] x * weight / sqrt(mean(x^2) + eps), weight [H]."""
    if run_natively(x, weight):
        normed: Tensor = _RmsNorm.apply(x.contiguous(), weight, eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor
        normed, inverse = torch.ops.megatron_rl.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = gradients[0].contiguous()
        return *torch.ops.megatron_rl.rms_norm_backward(grad, x, weight, inverse), None


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F] gates, and behind them what they let through -> [..., F]; without a gradient."""
    if run_natively(x):
        product: Tensor = torch.ops.megatron_rl.swiglu(x.contiguous())
        return product
    gate, through = x.chunk(2, -1)
    return F.silu(gate) * through


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """[..., 2 F] the gradient of swiglu's x, from that of its result [..., F]."""
    if run_natively(grad, x):
        of_x: Tensor = torch.ops.megatron_rl.swiglu_backward(grad.contiguous(), x.contiguous())
        return of_x
    gate, through = x.chunk(2, -1)
    of_gate = torch.ops.aten.silu_backward(grad * through, gate)
    return torch.cat([of_gate, grad * F.silu(gate)], dim=-1)


def turn(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """[T, heads, d] whose halves turn together by the angles [T, 1, d/2]; sign -1: back.

    A product and a sum, each rounded, as transformers has it; both ways give the same bits.
    """
    if heads.stride(-1) == 1 and run_natively(heads, cos, sin):
        native_turned: Tensor = torch.ops.megatron_rl.turn(heads, cos, sin, sign)
        return native_turned
    halves = heads.unflatten(-1, (2, -1))  # [T, heads, 2, d/2]
    turned: Tensor = halves * cos[:, None]
    product = halves[..., 1, :] * sin
    turned[..., 0, :].add_(product, alpha=-sign)
    torch.mul(halves[..., 0, :], sin, out=product)
    turned[..., 1, :].add_(product, alpha=sign)
    return turned.flatten(-2).to(heads.dtype)


def attend_next(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor],
    positions: Tensor,
    *,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """[n, heads * d] attention of the next tokens of n sequences, where run_natively of all.

    Their keys and values are kept, which is no more of the cache than each has.

    Args:
        query: [n, heads, d]; key and value [n, groups, d].
        cache: keys and values [at least n slots, groups, tokens, d]; row i belongs to slot i.
        positions: [n] int64 of the tokens in their sequences.
        scale: of scores; None: 1 / sqrt(d).
        window: the newest tokens that each sees, itself among them; None: all.
    """
    heads = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    scale = query.size(-1) ** -0.5 if scale is None else scale
    out: Tensor = torch.ops.megatron_rl.attend_next_(*heads, *cache, positions, scale, window or 0)
    return out
