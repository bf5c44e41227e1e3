"""The norm that our layer spec puts in place of Megatron's."""

from typing import Any

import torch


class Norm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    The tag makes finalize_model_grads sum the weight's gradient over tensor-parallel ranks, each of
    which saw other tokens. Without it the gradient is wrong, and nothing says so.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
