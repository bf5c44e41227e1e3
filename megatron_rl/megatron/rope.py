"""Rotary position embedding of packed rows: angles once per row, used by every layer.

Where layers are Transformer Engine's, its fused rope runs instead.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_rl.ops.fused_layers import turn
from megatron_rl.weights.arch import ModelArch, YarnRope
from megatron_rl.weights.families.hf_rope import LLAMA3_ROPE


@dataclass(frozen=True)
class Rotation:
    """The angles of one packed row.

    Each turns an entry of the first half of a head and its partner in the second half. Where only
    the first r entries of a head turn, these are the head's halves, and the rest stays. Where
    neighbours turn together, they are put into the halves: queries and keys agree in that order.
    """

    cos: Tensor  # [T, 1, r/2]
    sin: Tensor  # [T, 1, r/2]
    interleaved: bool = False  # neighbours turn together
    near: "Rotation | None" = None  # of layers with a window, where it is another

    def of(self, window: int | None) -> "Rotation":
        """That of layers with such a window; None: of those that see all before a token."""
        return self if window is None or self.near is None else self.near

    def turned(self, heads: Tensor) -> Tensor:
        """[T, heads, d] queries or keys at their positions."""
        size = 2 * self.cos.shape[-1]
        if self.interleaved:
            heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        if size == heads.shape[-1]:
            turned: Tensor = _Turn.apply(heads, self.cos, self.sin)
            return turned
        turning, still = heads.split((size, heads.shape[-1] - size), dim=-1)
        return torch.cat([_Turn.apply(turning, self.cos, self.sin), still], dim=-1)


class Rope:
    """The frequencies of a model; float32 whatever its dtype, as in transformers and vLLM."""

    near: Tensor | None = None  # [r/2] those of layers with a window, where they are others

    def __init__(self, arch: ModelArch, dtype: torch.dtype, device: torch.device) -> None:
        # On the CPU first: powers of another device are others in the last bit.
        self.frequencies = frequencies(arch).to(device)  # [r/2]
        scaling = arch.yarn or arch.long_rope
        self.amplitude = 1.0 if scaling is None else scaling.amplitude
        self.interleaved = arch.latent is not None and arch.latent.interleaved
        if arch.sliding is not None and arch.sliding.rope_theta is not None:
            unscaled = replace(arch, yarn=None, long_rope=None, rope_scaling_factor=None)
            plain = replace(unscaled, rope_theta=arch.sliding.rope_theta)
            self.near = frequencies(plain).to(device)
        # In float32, 16 bits are turned in float32, too.
        self.dtype = torch.promote_types(dtype, torch.float32) if arch.turns_in_float32 else dtype

    def rotation(self, position_ids: Tensor) -> Rotation:
        """The angles of a row; position_ids [T] int64."""
        near = None
        if self.near is not None:
            near = Rotation(*self._waves(position_ids, self.near, 1.0), self.interleaved)
        waves = self._waves(position_ids, self.frequencies, self.amplitude)
        return Rotation(*waves, self.interleaved, near)

    def _waves(
        self, position_ids: Tensor, frequencies: Tensor, amplitude: float
    ) -> tuple[Tensor, Tensor]:
        """[T, 1, r/2] cosines and sines."""
        angles = torch.outer(position_ids.float(), frequencies)[:, None]
        waves = angles.cos(), angles.sin()
        if amplitude != 1.0:
            waves = waves[0] * amplitude, waves[1] * amplitude
        return waves[0].to(self.dtype), waves[1].to(self.dtype)


def frequencies(arch: ModelArch) -> Tensor:
    """[r/2] float32 radians per position, r entries of a head turning: all of them, mostly.

    Under llama3's scaling, waves much longer than the context of pretraining are stretched by its
    factor, much shorter ones not at all, and those between by a blend of both.
    """
    size = arch.rotary_dim or arch.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    lengths = arch.rope_theta**exponents  # of the waves, over 2 pi, in tokens
    if arch.yarn is not None:
        return _stretched_by_yarn(lengths, arch.rope_theta, arch.yarn)
    if arch.long_rope is not None:
        factors = torch.tensor(arch.long_rope.factors, dtype=torch.float32, device="cpu")
        return 1.0 / (factors.to(lengths.device) * lengths)
    plain = 1.0 / lengths
    if arch.rope_scaling_factor is None:
        return plain
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    waves = LLAMA3_ROPE["original_max_position_embeddings"] / (2 * math.pi / plain)
    stretched = plain / arch.rope_scaling_factor
    share = (waves - low) / (high - low)
    blend = (1 - share) * plain / arch.rope_scaling_factor + share * plain
    return torch.where(waves < low, stretched, torch.where(waves > high, plain, blend))


def _stretched_by_yarn(lengths: Tensor, theta: float, yarn: YarnRope) -> Tensor:
    """YaRN's frequencies: [d/2] float32, between 1 / lengths and that over factor.

    The share that is stretched rises evenly over the dimensions, from the one that turns beta_fast
    times in the original context to the one that turns beta_slow times.
    """
    size = 2 * len(lengths)
    low, high = (
        size
        * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
        / (2 * math.log(theta))
        for turns in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.rounds_range:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001  # as transformers and vLLM have it: a step there
    kept = 1 - ((torch.arange(len(lengths), dtype=torch.float32) - low) / width).clamp(0, 1)
    return (1.0 / (yarn.factor * lengths)) * (1 - kept) + (1.0 / lengths) * kept


class _Turn(torch.autograd.Function):
    """The rotation; its backward turns back, so nothing but the row's angles is kept."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(gradients[0], cos, sin, -1), None, None
