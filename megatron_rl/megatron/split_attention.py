"""The attention of rows of which each context-parallel rank holds a part.

Keys and values of a layer are brought together; queries stay where they are. They are not kept:
where a backward asks for them they are brought together again. So a rank holds those of a whole row
of one layer at a time, which with grouped queries are few; a ring, which passes them on, would hold
fewer and send as many.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rl.parallel.context import SequenceChunk, chunks_of, gathered_places

Masks = dict[tuple[torch.dtype, int | None], Tensor]
"""Those of one row, by the dtype of scores and the window of a layer; None: it has none."""


@dataclass(frozen=True)
class Half:
    """The early or the late chunks of a row's sequences on this rank, and the keys that they see.

    A chunk sees its sequence from the start to its own last token.
    """

    queries: Tensor  # [Q] int64, entries of this rank's tokens
    keys: Tensor  # [K] int64, entries of the gathered tokens: a run for each sequence
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_bounds: Tensor  # [sequences + 1] int32
    key_bounds: Tensor  # [sequences + 1] int32
    masks: Masks = field(default_factory=dict)  # that all layers share


@dataclass(frozen=True)
class Split:
    """How the attention of one row is split over the ranks of group."""

    group: dist.ProcessGroup
    halves: tuple[Half, Half]


def split_of(lengths: Sequence[int], bounds: Tensor, group: dist.ProcessGroup) -> Split:
    """Plan a row of such sequences, without a word from its device.

    bounds: [sequences + 1] int32 of the whole sequences, on the device.
    """
    cp, rank = group.size(), group.rank()
    places = gathered_places(lengths, cp, bounds.device)
    early, late = chunks_of(lengths, cp, rank)
    behind = 0  # own tokens of the sequences before
    own: tuple[list[int], list[int]] = ([], [])
    for chunk in early:
        own[0].append(behind)
        own[1].append(behind + chunk.length)
        behind += 2 * chunk.length
    of_chunks = bounds // (2 * cp)  # all chunks of a sequence are of one length
    return Split(
        group,
        (
            _half(early, own[0], places, of_chunks, rank + 1),
            _half(late, own[1], places, of_chunks, 2 * cp - rank),
        ),
    )


def _half(
    chunks: Sequence[SequenceChunk],
    own: Sequence[int],
    places: Tensor,
    bounds: Tensor,
    num_seen: int,
) -> Half:
    """bounds: of the chunks. num_seen: chunks of its sequence that each sees, itself included."""
    device = places.device
    queries = [
        torch.arange(a, a + c.length, device=device) for a, c in zip(own, chunks, strict=True)
    ]
    keys = [places[c.sequence_start : c.start + c.length] for c in chunks]
    query_lengths = tuple(c.length for c in chunks)
    key_lengths = tuple(c.start + c.length - c.sequence_start for c in chunks)
    return Half(
        queries=torch.cat(queries),
        keys=torch.cat(keys),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_bounds=bounds,
        key_bounds=bounds * num_seen,
    )


Attend = Callable[[Tensor, Tensor, Tensor, Half], Tensor]
"""[Q, heads, d] queries and [K, groups, d] keys and values of a half -> [Q, heads, d]."""


def attend_split(query: Tensor, key: Tensor, value: Tensor, split: Split, attend: Attend) -> Tensor:
    """[T, heads, d] attention of this rank's queries to the keys and values of the whole row.

    query: [T, heads, d]. key, value: [T, groups, d], this rank's.
    """
    own = torch.stack([key, value], 1)
    both, kept = _gathered(own, split.group), _Kept(own.detach(), split.group)
    parts = []
    for half in split.halves:
        seen = both.index_select(0, half.keys)  # [K, 2, groups, d]
        with kept.in_place_of(seen, half.keys):
            parts.append(attend(query.index_select(0, half.queries), seen[:, 0], seen[:, 1], half))
    order = torch.cat([half.queries for half in split.halves])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return torch.cat(parts).index_select(0, back)


def _gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[cp T, ...] of all ranks; backward sums over them what each has of a token's gradient."""
    gathered: Tensor = gather_from_sequence_parallel_region(own, True, group)
    return gathered


class _Kept:
    """This rank's keys and values of a layer, kept for its backward in the place of the row's."""

    def __init__(self, own: Tensor, group: dist.ProcessGroup) -> None:
        self._own, self._group = own, group
        self._both: Tensor | None = None
        self._asked_for = 0  # tensors that the backward has not asked for yet

    def in_place_of(self, seen: Tensor, keys: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which views of seen, the gathered entries keys, are kept as such."""
        storage = seen.untyped_storage()._cdata

        def pack(tensor: Tensor) -> Tensor | tuple[Any, ...]:
            if tensor.untyped_storage()._cdata != storage:
                return tensor
            self._asked_for += 1
            return tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            return self._anew().index_select(0, keys).as_strided(*packed)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _anew(self) -> Tensor:
        """[cp T, 2, groups, d], held until the last tensor that needs it has been asked for."""
        with torch.no_grad():
            both = _gathered(self._own, self._group) if self._both is None else self._both
        self._asked_for -= 1
        self._both = both if self._asked_for else None
        return both
