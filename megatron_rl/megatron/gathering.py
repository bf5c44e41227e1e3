"""Tokens of a row, picked by index, with gradients that are the same in every run."""

from typing import Any

import torch
from torch import Tensor


class Pad(torch.autograd.Function):
    """[T, ...] -> [P, ...], for an attention of whose padding nothing is read.

    So the padding's gradient is 0, and a token's is that of its own place.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return row.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class Repeat(torch.autograd.Function):
    """[T, ...] -> [K, ...] entries, some of them several times; their gradients are added up.

    Always in one order: index_select's own backward adds up in any order on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, entries: Tensor) -> Tensor:
        ctx.save_for_backward(entries)
        ctx.length = len(row)
        return row.index_select(0, entries)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (entries,), (gradient,) = ctx.saved_tensors, gradients
        added = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        if gradient.device.type == "cpu":
            return added.index_add_(0, entries, gradient), None
        return added.index_put_((entries,), gradient, accumulate=True), None  # sorts first


def kept_as_row(
    picked: Tensor, row: Tensor, entries: Tensor
) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which what a backward keeps of picked is the row that it is picked from.

    picked: row[entries]. It is picked again when the backward asks for it.
    """
    storage, row = picked.untyped_storage()._cdata, row.detach()

    def pack(tensor: Tensor) -> Tensor | tuple[Any, ...]:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return row.index_select(0, entries).as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def repeated(row: Tensor, entries: Tensor) -> Tensor:
    """[T, ...] -> [K, ...]: see Repeat."""
    picked: Tensor = Repeat.apply(row, entries)
    return picked
