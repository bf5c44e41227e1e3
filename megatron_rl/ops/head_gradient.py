"""The gradient of an LM head's weight: summed over chunks of rows, for autograd or in main_grad."""

from typing import Any

import torch
from torch import Tensor

from megatron_rl.ops.vocab_parallel import compute_dtype

BLOCK_ELEMENTS = 2**22
"""Of a product that a CPU adds up at a time. A whole product, and the copy of it that a sum of two
dtypes makes, are so large that the system gives fresh memory for them every time, which costs more
than the product; 8 and 16 MB are used again. Smaller blocks wait more often for a second thread."""


class HeadGradient:
    """The sum over chunks of logits_grad.T @ hidden, [V/tp, H], in the compute dtype.

    For autograd it is a tensor of its own, rounded once to the dtype of weight. Into main_grad, the
    buffer in which Megatron's DDP adds up and reduces gradients, it takes no memory.
    """

    def __init__(self, weight: Tensor, *, num_chunks: int, into_main_grad: bool) -> None:
        self._weight: Any = weight  # has attributes of Megatron's
        self._num_chunks, self._into_main_grad = num_chunks, into_main_grad
        self._total = main_grad_of(weight) if into_main_grad else None

    def add(self, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add the product of a chunk of C rows: [C, V/tp] and [C, H]."""
        if self._total is None and self._num_chunks == 1:
            self._total = logits_grad.T @ hidden  # rounded once, like a sum over chunks
            return
        is_first = self._total is None
        if self._total is None:
            dtype = compute_dtype(self._weight.dtype)
            self._total = torch.empty_like(self._weight, dtype=dtype, requires_grad=False)
        add_product(self._total, logits_grad.T, hidden, overwrites=is_first)

    def rescale(self, grad: Tensor) -> None:
        """Times grad, which almost always is 1; then nothing is done. Native ops only.

        main_grad holds the gradients of others too, so there any other number makes NaN of it.
        """
        if self._total is None:
            return
        if self._into_main_grad:
            grad = grad.where(grad == 1, torch.nan)
        torch.ops.megatron_rl.rescale_if_(self._total, grad.contiguous(), 1.0)

    def hand_over(self) -> Tensor | None:
        """What a backward returns as the gradient of weight.

        For one that is in main_grad already, Megatron's hook wants to be told so, and a gradient to
        ignore: without any it would run on another thread, out of order with the collectives of
        other ranks. An empty sparse one takes no memory. Where an embedding shares the weight, its
        gradient arrives there anyhow, and must be added.
        """
        if not self._into_main_grad:
            total = self._total
            return torch.zeros_like(self._weight) if total is None else total.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True
        if getattr(self._weight, "zero_out_wgrad", False):
            return None
        weight = self._weight
        return torch.zeros(
            weight.shape, dtype=weight.dtype, device=weight.device, layout=torch.sparse_coo
        )


def add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrites: bool = False) -> None:
    """Add left @ right to total in place, whose dtype may be a wider one; or write it there."""
    beta = 0 if overwrites else 1
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=beta)
    elif right.is_cuda:  # not rounded in between
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        size = max(1, BLOCK_ELEMENTS // right.size(1))
        for part, rows in zip(total.split(size), left.split(size), strict=True):
            part.copy_(rows @ right) if overwrites else part.add_(rows @ right)


def main_grad_of(weight: Any) -> Tensor:
    """Raises ValueError where there is none."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise ValueError(
            "into_main_grad=True: weight has no main_grad; wrap its module in Megatron's "
            "DistributedDataParallel, or leave into_main_grad out"
        )
    return main_grad
