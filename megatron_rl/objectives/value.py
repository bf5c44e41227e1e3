"""The critic's loss: squared errors, pessimistic about values that moved far.

loss = sum_t weight_t * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2

Source: Schulman et al., openai/baselines ppo2 (the clipped form); arXiv:2005.12729, section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VALUE_SUMS = (
    "tokens",
    "loss",
    "clipped",
    "value",  # old values
    "return",
    "return_squared",
    "error",  # returns - old values
    "error_squared",
)
"""Order of ValueLoss.sums: to be added over micro-batches and data-parallel ranks."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValueLoss:
    """A loss, and the sums measured on the way."""

    loss: Tensor  # [], with gradient, in the dtype of values
    sums: Tensor  # [len(VALUE_SUMS)] float64, detached


def value_loss(
    values: Tensor, *, old_values: Tensor, returns: Tensor, weight: float, clip: float | None
) -> ValueLoss:
    """Loss of N tokens; tensors are [N], and weight is each token's share of the global loss."""
    old, target = old_values.to(values.dtype), returns.to(values.dtype)
    squared = (values - target).square()
    if clip is not None:
        near = torch.clamp(values, min=old - clip, max=old + clip)
        squared = torch.maximum(squared, (near - target).square())
        clipped = squared > (values - target).square()
    else:
        clipped = torch.zeros_like(values, dtype=torch.bool)
    loss = weight * squared.sum() / 2
    with torch.no_grad():
        error = target - old
        measured = (
            torch.ones_like(old), weight * squared / 2, clipped, old, target, target.square(),
            error, error.square(),
        )  # fmt: skip
        sums = torch.stack([column.double().sum() for column in measured])
    return ValueLoss(loss=loss, sums=sums)


def value_metrics(sums: Tensor) -> dict[str, float]:
    """Named metrics of accumulated VALUE_SUMS [8]; {} where nothing was measured."""
    total = dict(zip(VALUE_SUMS, sums.tolist(), strict=True))
    tokens = total["tokens"]
    if not tokens:
        return {}
    variance = _variance(total["return"], total["return_squared"], tokens)
    unexplained = _variance(total["error"], total["error_squared"], tokens)
    metrics = {
        "critic/loss": total["loss"],
        "critic/clip_frac": total["clipped"] / tokens,
        "critic/value_mean": total["value"] / tokens,
        "critic/return_mean": total["return"] / tokens,
    }
    if variance > 0:
        metrics["critic/explained_variance"] = 1 - unexplained / variance
    return metrics


def _variance(total: float, squares: float, count: float) -> float:
    return squares / count - (total / count) ** 2
