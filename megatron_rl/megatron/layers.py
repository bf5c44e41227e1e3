"""Norms, a linear that ends in one, and attention with gates, which our layer spec puts in."""

from typing import Any, ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_rl.ops.fused_layers import rms_norm


class Norm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    The tag makes finalize_model_grads sum the weight's gradient over tensor-parallel ranks, each of
    which saw other tokens. Without it the gradient is wrong, and nothing says so.
    """

    eps: float

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight, self.eps)


class CentredNorm(Norm):
    """The same, of a weight that is kept as its difference from 1; computed in float32 at least."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        normed = rms_norm(hidden.to(wide), weight, self.eps)
        return normed.to(hidden.dtype)


class GatedAttention(SelfAttention):
    """Attention whose output is scaled by gates in the dtype of the model, as the engine does."""

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.reshape(x.shape).sigmoid()


class NormedRowParallelLinear(RowParallelLinear):
    """A linear whose whole output, as tensor-parallel ranks have added it up, is normed."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.norm = Norm(self.config, self.output_size, self.config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, 1, F/tp] -> [T, 1, H], or [T/tp, 1, H] under sequence parallelism."""
        output, bias = super().forward(hidden)
        assert bias is None
        return self.norm(output), None


class WideNorm(torch.nn.Module):
    """RMSNorm over all heads of a token, of which each tensor-parallel rank has some.

    Every rank has the weights of all heads, and a gradient of its own ones. finalize_model_grads
    adds up what norms of queries and keys have, by their names and without a tag.
    """

    total_heads: ClassVar[str]  # the field of Megatron-Core's configuration with their number

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: object) -> None:
        """hidden_size: of one head."""
        super().__init__()
        self.eps = eps
        width = getattr(config, self.total_heads) * hidden_size
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=config.params_dtype))

    @property
    def own_weight(self) -> Tensor:
        """The weights of this rank's heads."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        own: Tensor = self.weight.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return own

    def forward(self, heads: Tensor) -> Tensor:
        """[T, 1, heads/tp, d]; 16 bits are normed in float32."""
        entries = heads.flatten(-2)
        wide = entries if entries.dtype == torch.float64 else entries.float()
        squares = wide.square().sum(-1, keepdim=True)
        # Each rank's gradient of the sum is that of its own heads: they are added up as well.
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares)
        )
        normed = wide * torch.rsqrt(squares / len(self.weight) + self.eps)
        return (self.own_weight * normed).to(heads.dtype).view_as(heads)


class QueryNorm(WideNorm):
    """That of queries."""

    total_heads = "num_attention_heads"


class KeyNorm(WideNorm):
    """That of keys."""

    total_heads = "num_query_groups"
