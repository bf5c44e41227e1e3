"""Keys and values of sequences that responses are sampled for, and attention to them.

A sequence has a slot in every layer of this rank; slots in use are the first ones.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.megatron.attention import PackedAttention, PackedRows


class KeyValueCache:
    """Memory for so many sequences of so many tokens; a layer's is made when it is first used."""

    def __init__(self, num_slots: int, num_tokens: int) -> None:
        self._num_slots, self._num_tokens = num_slots, num_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, [slots, groups/tp, tokens, d] each; key: [T, groups/tp, d].

        They begin as zeros: a masked entry counts for 0 times itself, which must be a number.
        """
        if layer not in self._layers:
            shape = (self._num_slots, key.size(1), self._num_tokens, key.size(2))
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._layers[layer]

    def move(self, sources: Tensor, targets: Tensor, num_tokens: int) -> None:
        """Copy the first tokens of some slots [k] into as many other ones."""
        for keys, values in self._layers.values():
            for cache in (keys, values):
                cache[targets, :, :num_tokens] = cache[sources, :, :num_tokens]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A row of prompts, whose keys and values are kept in the slots of all their responses."""

    cache: KeyValueCache
    rows: PackedRows  # the same row without a memory
    entries: Tensor  # [K] int64: of the row, as often as there are responses
    slots: Tensor  # [K] int64
    positions: Tensor  # [K] int64

    def attend(self, layer: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.of(layer.layer_number, key)
        keys[self.slots, :, self.positions] = key.index_select(0, self.entries)
        values[self.slots, :, self.positions] = value.index_select(0, self.entries)
        return layer.attend(query, key, value, self.rows)


@dataclass(frozen=True, kw_only=True)
class NextTokens:
    """A row of one token for each of the first n slots; entries behind them are padding."""

    cache: KeyValueCache
    slots: Tensor  # [n] int64, ascending from 0
    positions: Tensor  # [n] int64 of the tokens in their sequences
    length: int  # more than all positions
    mask: Tensor  # [n, 1, 1, length]: 0 up to a token's position, and -inf behind it

    def attend(self, layer: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n = len(self.slots)
        keys, values = self.cache.of(layer.layer_number, key)
        keys[self.slots, :, self.positions] = key[:n]
        values[self.slots, :, self.positions] = value[:n]
        # The heads of a group attend to the same keys: as if they were queries of one head.
        out = F.scaled_dot_product_attention(
            query[:n].unflatten(1, (key.size(1), -1)),
            keys[:n, :, : self.length],
            values[:n, :, : self.length],
            attn_mask=self.mask,
            scale=layer.scale,
        ).flatten(1)
        if n == len(query):
            return out
        return torch.cat([out, out.new_zeros(len(query) - n, out.size(1))])


class Nothing:
    """A row of padding alone, which other ranks' experts need."""

    def attend(self, layer: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.zeros_like(query).flatten(1)
