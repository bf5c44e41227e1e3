"""Keys, values and states of sequences that responses are sampled for, and their use.

A sequence has a slot in every layer of this rank; slots in use are the first ones.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.megatron.attention import PackedAttention, PackedRows
from megatron_rl.ops.fused_layers import attend_next, run_natively


class KeyValueCache:
    """Memory for so many sequences of so many tokens; a layer's is made when it is first used."""

    def __init__(self, num_slots: int, num_tokens: int) -> None:
        self._num_slots, self._num_tokens = num_slots, num_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._nets: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, [slots, groups/tp, tokens, d] each; key: [T, groups/tp, d].

        They begin as zeros: a masked entry counts for 0 times itself, which must be a number.
        """
        if layer not in self._layers:
            shape = (self._num_slots, key.size(1), self._num_tokens, key.size(2))
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._layers[layer]

    def of_net(self, net: Any, mixed: Tensor) -> tuple[Tensor, Tensor]:
        """What a gated delta net has of every slot: the last inputs of its convolution, its state.

        [slots, kernel - 1, rows/tp], and [slots, heads/tp, k, v] in float32 or wider. Both begin as
        zeros, which is how a sequence begins. mixed: [T, rows/tp] inputs of the convolution.
        """
        if net.layer_number not in self._nets:
            rows = (self._num_slots, net.conv_kernel_dim - 1, mixed.size(1))
            heads = (net.num_v_heads_local_tp, net.key_head_dim, net.value_head_dim)
            wide = torch.promote_types(mixed.dtype, torch.float32)
            state = mixed.new_zeros(self._num_slots, *heads, dtype=wide)
            self._nets[net.layer_number] = (mixed.new_zeros(rows), state)
        return self._nets[net.layer_number]

    def move(self, sources: Tensor, targets: Tensor, num_tokens: int) -> None:
        """Copy the first tokens of some slots [k] into as many other ones."""
        for keys, values in self._layers.values():
            for cache in (keys, values):
                cache[targets, :, :num_tokens] = cache[sources, :, :num_tokens]
        for inputs, states in self._nets.values():
            inputs[targets], states[targets] = inputs[sources], states[sources]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A row of prompts, whose keys and values are kept in the slots of all their responses."""

    cache: KeyValueCache
    rows: PackedRows  # the same row without a memory
    entries: Tensor  # [K] int64: of the row, as often as there are responses
    slots: Tensor  # [K] int64
    positions: Tensor  # [K] int64
    all_slots: Tensor  # [S] int64: those of all responses
    prompts: Tensor  # [S] int64: the prompt of each, by number
    ends: Tensor  # [S] int64: of the row, behind it

    def recur(self, net: Any, mixed: Tensor, share: Tensor, decay: Tensor) -> Tensor:
        """Outputs; the states of prompts are kept for all of their responses."""
        inputs, states = self.cache.of_net(net, mixed)
        plan = net.planned(self.rows)
        out: Tensor
        out, last = net.whole(mixed, share, decay, row=plan)
        of_run = torch.tensor(plan.levels[0].runs).argsort().to(mixed.device)
        states[self.all_slots] = last[of_run[self.prompts]]
        at = self.ends - 1
        for place in range(inputs.size(1)):  # the oldest comes first
            back = inputs.size(1) - 1 - place
            seen = mixed[at] if back == 0 else mixed[plan.before[back - 1][at]]
            missing = None if back == 0 else ~plan.has_before[back - 1][at]
            inputs[self.all_slots, place] = (
                seen if missing is None else seen.masked_fill(missing, 0)
            )
        return out

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
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by the window of a layer

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n, 1, 1, length]: 0 where a token sees a position, and -inf elsewhere."""
        if window not in self.masks:
            places = torch.arange(self.length, device=self.positions.device)
            hidden = places > self.positions[:, None]
            if window is not None:
                hidden |= places <= self.positions[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[window] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self.masks[window]

    def recur(self, net: Any, mixed: Tensor, share: Tensor, decay: Tensor) -> Tensor:
        n = len(self.slots)
        inputs, states = self.cache.of_net(net, mixed)
        seen = torch.cat([inputs[:n], mixed[:n, None]], dim=1)
        out: Tensor
        out, states[:n] = net.next(seen, share[:n], decay[:n], states[:n])
        inputs[:n] = seen[:, 1:]
        if n == len(mixed):
            return out
        return torch.cat([out, out.new_zeros(len(mixed) - n, *out.shape[1:])])

    def attend(self, layer: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n = len(self.slots)
        cache = self.cache.of(layer.layer_number, key)
        own = query[:n], key[:n], value[:n]
        if run_natively(*own, *cache):
            out = attend_next(*own, cache, self.positions, scale=layer.scale, window=layer.window)
        else:
            out = self._attend_padded(layer, *own, *cache)
        if n == len(query):
            return out
        return torch.cat([out, out.new_zeros(len(query) - n, out.size(1))])

    def _attend_padded(
        self,
        layer: PackedAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        n = len(query)
        keys[self.slots, :, self.positions] = key
        values[self.slots, :, self.positions] = value
        # The heads of a group attend to the same keys: as if they were queries of one head.
        return F.scaled_dot_product_attention(
            query.unflatten(1, (key.size(1), -1)),
            keys[:n, :, : self.length],
            values[:n, :, : self.length],
            attn_mask=self.mask(layer.window, query.dtype),
            scale=layer.scale,
        ).flatten(1)


class Nothing:
    """A row of padding alone, which other ranks' experts need."""

    def recur(self, net: Any, mixed: Tensor, share: Tensor, decay: Tensor) -> Tensor:
        heads = (net.num_v_heads_local_tp, net.value_head_dim)
        return mixed.new_zeros(len(mixed), *heads)

    def attend(self, layer: PackedAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.zeros_like(query).flatten(1)
