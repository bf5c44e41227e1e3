"""The attention of rows in which a prompt stands once before the responses to it.

A response's queries see the keys of the prompt and, causally, its own. Keys and values are picked
once more for every response, since those of grouped queries are few; queries, and all that the
layers compute of a token, are there once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rl.megatron.gathering import Pad, kept_as_row, repeated
from megatron_rl.megatron.split_attention import Half, Masks
from megatron_rl.types import SharedPrompts

OfHalf = Callable[[Tensor, Tensor, Tensor, Half], Tensor]
OfBlock = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[n, heads, q, d] queries and [n, heads, k, d] keys and values of a block, of which queries are
the last ones -> [n, heads, q, d]."""


@dataclass(frozen=True)
class Seen:
    """The keys that the runs of a row see, for an attention of sequences of any length."""

    half: Half

    def attend(self, query: Tensor, key: Tensor, value: Tensor, of_half: OfHalf) -> Tensor:
        """[T, heads, d] queries, [T, groups, d] keys and values -> [T, heads, d]."""
        both, entries = torch.stack([key, value], 1), self.half.keys
        seen = repeated(both, entries)  # [K, 2, groups, d]
        with kept_as_row(seen, both, entries):
            return of_half(query, seen[:, 0], seen[:, 1], self.half)


@dataclass(frozen=True)
class SeenBlocks:
    """The same in blocks: runs of like length behind prompts of one length, padded alike.

    P: queries of all blocks, K: keys.
    """

    sizes: tuple[tuple[int, int, int], ...]  # (runs, length, tokens of the prompt) each
    queries: Tensor  # [P] int64 into the row; tails are repeated
    places: Tensor  # [T] int64: queries[places[t]] = t
    keys: Tensor  # [K] int64 into the row; tails are repeated
    masks: Masks = field(default_factory=dict)  # made by the first layers

    def attend(self, query: Tensor, key: Tensor, value: Tensor, of_block: OfBlock) -> Tensor:
        """As above. No token sees the padding behind it, and padded outputs are not read."""
        repeats = query.size(1) // key.size(1)
        padded = Pad.apply(query, self.queries, self.places)
        queries = padded.split([runs * length for runs, length, _ in self.sizes])
        key_sizes = [runs * (before + length) for runs, length, before in self.sizes]
        keys, values = (repeated(x, self.keys).split(key_sizes) for x in (key, value))
        outputs = []
        for (runs, length, before), *parts in zip(self.sizes, queries, keys, values, strict=True):
            lengths = (length, before + length, before + length)
            q, k, v = (
                part.unflatten(0, (runs, n)).transpose(1, 2)
                for part, n in zip(parts, lengths, strict=True)
            )
            if repeats > 1:
                k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            outputs.append(of_block(q, k, v).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.places)


def seen_of(shared: SharedPrompts, lengths: tuple[int, ...], bounds: Tensor) -> Seen:
    """bounds: [runs + 1] int32 of the runs."""
    return Seen(
        Half(
            queries=torch.empty(0, dtype=torch.int64),  # all tokens, as they stand
            keys=shared.keys,
            query_lengths=lengths,
            key_lengths=shared.key_lengths,
            query_bounds=bounds,
            key_bounds=shared.key_bounds,
        )
    )


def blocks_of(
    shared: SharedPrompts, lengths: tuple[int, ...], device: torch.device, *, most_waste: float
) -> SeenBlocks:
    """Blocks of runs whose lengths differ by a factor of most_waste, plus 16 tokens, at most.

    Indices are made where they are used: a copy from the host would wait for the device.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    before = [0 if prompt is None else lengths[prompt] for prompt in shared.prompts]
    blocks: list[list[int]] = []
    for run in sorted(range(len(lengths)), key=lambda run: (before[run], lengths[run])):
        first = blocks[-1][0] if blocks else run
        is_alike = before[run] == before[first] and (
            lengths[run] <= most_waste * lengths[first] + 16
        )
        if not blocks or not is_alike:
            blocks.append([])
        blocks[-1].append(run)
    queries, keys = [], []
    places: dict[int, Tensor] = {}
    at = 0
    for block in blocks:
        length = lengths[block[-1]]
        for run in block:
            own = torch.arange(starts[run], starts[run] + length, device=device)
            own.clamp_(max=starts[run] + lengths[run] - 1)
            queries.append(own)
            prompt = shared.prompts[run]
            if prompt is not None:
                keys.append(torch.arange(starts[prompt], starts[prompt + 1], device=device))
            keys.append(own)
            places[run] = torch.arange(at, at + lengths[run], device=device)
            at += length
    return SeenBlocks(
        sizes=tuple((len(block), lengths[block[-1]], before[block[0]]) for block in blocks),
        queries=torch.cat(queries),
        places=torch.cat([places[run] for run in range(len(lengths))]),
        keys=torch.cat(keys),
    )
