"""The norms, and the attention with gates, that our layer spec puts in place of Megatron's."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor


class Norm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    The tag makes finalize_model_grads sum the weight's gradient over tensor-parallel ranks, each of
    which saw other tokens. Without it the gradient is wrong, and nothing says so.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CentredNorm(Norm):
    """The same, of a weight that is kept as its difference from 1; computed in float32 at least."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        normed = F.rms_norm(hidden.to(wide), self.normalized_shape, weight, self.eps)
        return normed.to(hidden.dtype)


class GatedAttention(SelfAttention):
    """Attention whose output is scaled by gates in the dtype of the model, as the engine does."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.reshape(x.shape).sigmoid()
