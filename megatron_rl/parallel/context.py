"""Context parallelism: which tokens of a packed row a rank holds, and values brought together.

Every sequence is cut into 2 cp chunks of one length, and rank r holds chunks r and 2 cp - 1 - r. An
early chunk attends to few tokens and a late one to many, so all ranks have the same work. This is
the cut that Megatron-Core's rope and Transformer Engine's attention expect.

Example: cp 2, a sequence of 8 tokens. Rank 0 holds tokens 0, 1, 6, 7, and rank 1 holds 2, 3, 4, 5.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """A run of tokens of one sequence, on the rank that holds it."""

    start: int  # in the row
    length: int
    sequence_start: int  # of its sequence, in the row


def chunks_of(
    lengths: Sequence[int], cp: int, cp_rank: int
) -> tuple[list[SequenceChunk], list[SequenceChunk]]:
    """The early and the late chunk of every sequence on a rank.

    lengths: of the sequences of the row, multiples of 2 cp.
    """
    early, late = [], []
    at = 0
    for length in lengths:
        size = length // (2 * cp)
        early.append(SequenceChunk(at + cp_rank * size, size, at))
        late.append(SequenceChunk(at + (2 * cp - 1 - cp_rank) * size, size, at))
        at += length
    return early, late


def own_entries(lengths: Sequence[int], cp: int, cp_rank: int, device: torch.device) -> Tensor:
    """[T/cp] int64, ascending: the entries of a row that a rank holds, in its own order."""
    early, late = chunks_of(lengths, cp, cp_rank)
    parts = [chunk for pair in zip(early, late, strict=True) for chunk in pair]
    return torch.cat([torch.arange(c.start, c.start + c.length, device=device) for c in parts])


def gathered_places(lengths: Sequence[int], cp: int, device: torch.device) -> Tensor:
    """[T] int64: where each entry of a row lies when the parts of all ranks stand in rank order."""
    order = torch.cat([own_entries(lengths, cp, rank, device) for rank in range(cp)])
    places = torch.empty_like(order)
    return places.scatter_(0, order, torch.arange(len(order), device=device))


def whole(values: Tensor, own: Tensor, size: int, group: dist.ProcessGroup) -> Tensor:
    """[size] values of all ranks of group; own [n] int64 are the places of this rank's values [n].

    Every place belongs to one rank. A loss that every rank computes from all of them, alike, gets
    its gradient right: each rank takes that of its own.
    """
    brought: Tensor = _Whole.apply(values, own, size, group)
    return brought


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, own: Tensor, size: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(own)
        brought = values.new_zeros(size).index_copy_(0, own, values)
        dist.all_reduce(brought, group=group)
        return brought

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return gradients[0].index_select(0, own), None, None, None


def padded(lengths: Sequence[int], cp: int) -> Iterator[int]:
    """The lengths, each filled up to a multiple of 2 cp; as they are where no sequence is cut."""
    multiple = 2 * cp if cp > 1 else 1
    return (length + -length % multiple for length in lengths)
