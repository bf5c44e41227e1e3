"""The gradient of an LM head's weight: summed over chunks of rows, for autograd or in a buffer."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.ops.products import add_product, product
from megatron_rl.ops.vocab_parallel import compute_dtype

BLOCK_ELEMENTS = 2**22
"""Number of elements of the product that a CPU computes and adds per step. A whole product would be
fresh memory each time, which costs more than computing it; the memory of a block, 8 or 16 MB, is
used again. Smaller blocks wait more often for a second thread."""


class GradientBuffer(Protocol):
    """Memory that adds up the gradients of one weight over the losses of a step."""

    @property
    def total(self) -> Tensor:
        """The sum so far, in the shape of the weight and maybe a wider dtype; added to in place."""
        ...

    def hand_over(self) -> Tensor | None:
        """The gradient of the weight that a backward returns while the true one is in total."""
        ...


class HeadGradient:
    """The sum over chunks of logits_grad.T @ hidden, [V/tp, H], in the compute dtype.

    For autograd it is a tensor of its own, rounded once to the dtype of weight. In a buffer it
    takes no memory.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        num_chunks: int,
        buffer: GradientBuffer | None,
        loss_scale: float = 1.0,
    ) -> None:
        """loss_scale: of native ops, as in Head."""
        self._weight, self._num_chunks, self._buffer = weight, num_chunks, buffer
        self._loss_scale = loss_scale
        self._total = None if buffer is None else buffer.total

    def add(self, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add the product of a chunk of C rows: [C, V/tp] and [C, H]."""
        if self._total is None and self._num_chunks == 1:
            self._total = product(logits_grad.T, hidden)  # rounded once, like a sum over chunks
            return
        is_first = self._total is None
        if self._total is None:
            dtype = compute_dtype(self._weight.dtype)
            self._total = torch.empty_like(self._weight, dtype=dtype, requires_grad=False)
        add_widened(self._total, logits_grad.T, hidden, overwrites=is_first)

    def rescale(self, grad: Tensor) -> None:
        """Bring from loss_scale to grad [], which it almost always is; then nothing is done.

        Native ops only.

        A buffer holds gradients of other losses too, which must not be scaled, so there any other
        number turns it to NaN.
        """
        if self._total is None:
            return
        if self._buffer is not None:
            grad = grad.where(grad == self._loss_scale, torch.nan)
        torch.ops.megatron_rl.rescale_if_(self._total, grad.contiguous(), self._loss_scale)

    def hand_over(self) -> Tensor | None:
        """The gradient of weight that a backward returns."""
        if self._buffer is not None:
            return self._buffer.hand_over()
        total = self._total
        return torch.zeros_like(self._weight) if total is None else total.to(self._weight.dtype)


def add_widened(total: Tensor, left: Tensor, right: Tensor, *, overwrites: bool = False) -> None:
    """Add left [a, b] @ right [b, c] to total [a, c], maybe of a wider dtype, or write it there."""
    if total.dtype == right.dtype:
        add_product(total, left, right, overwrites=overwrites)
    elif right.device.type != "cpu":  # not rounded in between
        beta = 0 if overwrites else 1
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        size = max(1, BLOCK_ELEMENTS // right.size(1))
        for part, rows in zip(total.split(size), left.split(size), strict=True):
            part.copy_(rows @ right) if overwrites else part.add_(rows @ right)
