"""Rope and causal attention of packed rows, which local layers have in place of Megatron's.

Two kinds: torch's flash attention of sequences of any length, and blocks of padded sequences where
that has no kernel. ModelConfig.attention says which one a model has.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_rl.megatron.delta_rule import DeltaRow
from megatron_rl.megatron.gathering import Pad
from megatron_rl.megatron.rope import Rope, Rotation
from megatron_rl.megatron.shared_prompts import OfBlock, Seen, SeenBlocks, blocks_of, seen_of
from megatron_rl.megatron.split_attention import Half, Masks, Split, attend_split, split_of
from megatron_rl.types import MicroBatch

MAX_WASTE = 1.25
"""Sequences padded to a common length differ from it by at most this factor, plus 16 tokens."""

QUERIES_AT_A_TIME = 512

CAUSAL = (-1, 0)  # the window of varlen_attn: everything before a token, nothing behind it


def varlen_attn(*args: Any, **kwargs: Any) -> Any:
    """torch's, imported with the first call: it brings Dynamo along, and is for GPUs."""
    from torch.nn.attention.varlen import varlen_attn as of_torch

    return of_torch(*args, **kwargs)


def _no_index() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


class Remembered(Protocol):
    """Keys, values and states of earlier tokens, beside which a row is run."""

    def attend(self, layer: "PackedAttention", query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As PackedAttention.attend, of queries and keys that are turned."""
        ...

    def recur(self, net: Any, mixed: Tensor, share: Tensor, decay: Tensor) -> Tensor:
        """As DeltaNet.whole: outputs [T, heads/tp, v]."""
        ...


Runs = tuple[tuple[int, ...], tuple[int | None, ...]]
"""Lengths of the runs of a row, and behind which prompt each stands, if it stands behind one."""


@dataclass
class PackedRows(PackedSeqParams):
    """Megatron's parameters of a packed row, its rotation, and how it is padded into blocks.

    All of it is computed once per row and used by every local layer; Transformer Engine's take the
    row as it is. P: entries of all blocks, of which flash attention has none.
    """

    rotation: Rotation | None = None
    blocks: tuple[tuple[int, int], ...] = ()  # (sequences, length) each
    tokens: Tensor = field(default_factory=_no_index)  # [P] int64 into the row; tails are repeated
    places: Tensor = field(default_factory=_no_index)  # [T] int64: tokens[places[t]] = t
    masks: Masks = field(default_factory=dict)  # of blocks, made by the first layer with a window
    split: Split | None = None  # where ranks share every sequence; then there are no blocks
    seen: Seen | SeenBlocks | None = None  # where responses share a prompt; no blocks either
    remembered: Remembered | None = None  # where responses are sampled
    runs: Runs | None = None
    delta: DeltaRow | None = None  # made by the first gated delta net from the runs


def packed_rows(
    row: MicroBatch,
    rope: Rope | None,
    *,
    in_blocks: bool,
    sharing: dist.ProcessGroup | None = None,
) -> PackedRows:
    """Plan the attention of one row, without a word from its device.

    rope: of local layers, without which nothing is planned. sharing: those that have parts of it.
    """
    plan = rows_of(
        row.lengths,
        row.cu_seqlens,
        row.position_ids,
        rope,
        in_blocks=in_blocks and row.part is None and row.shared is None,
    )
    if rope is None:
        return plan
    if row.shared is not None:
        plan.runs = (row.lengths, row.shared.prompts)
    if row.part is not None:
        assert sharing is not None
        plan.split = split_of(row.lengths, row.cu_seqlens, sharing)
    elif row.shared is not None and in_blocks:
        device = row.tokens.device
        plan.seen = blocks_of(row.shared, row.lengths, device, most_waste=MAX_WASTE)
    elif row.shared is not None:
        plan.seen = seen_of(row.shared, row.lengths, row.cu_seqlens)
    return plan


def rows_of(
    lengths: tuple[int, ...],
    cu_seqlens: Tensor,
    position_ids: Tensor,
    rope: Rope | None,
    *,
    in_blocks: bool,
) -> PackedRows:
    """The same for sequences of these lengths, whose bounds are cu_seqlens."""
    longest = max(lengths)
    plan = PackedRows(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        runs=(lengths, (None,) * len(lengths)),
    )
    if rope is None:
        return plan
    plan.rotation = rope.rotation(position_ids)
    if in_blocks:
        _plan_blocks(plan, lengths, position_ids.device)
    return plan


def _plan_blocks(plan: PackedRows, lengths: tuple[int, ...], device: torch.device) -> None:
    """Pad sequences of like length to a common one.

    Indices are made where they are used: a copy from the host would wait for the device.
    """
    bounds = itertools.pairwise(itertools.accumulate(lengths, initial=0))
    # By length, so that sequences of like length are neighbours and share a block.
    order = sorted(enumerate(bounds), key=lambda s: s[1][1] - s[1][0])
    groups: list[list[tuple[int, tuple[int, int]]]] = []
    for number, (start, end) in order:
        shortest = lengths[groups[-1][0][0]] if groups else 0
        if not groups or end - start > MAX_WASTE * shortest + 16:
            groups.append([])
        groups[-1].append((number, (start, end)))
    tokens: list[Tensor] = []
    places: dict[int, Tensor] = {}
    at = 0
    for group in groups:
        length = lengths[group[-1][0]]
        for number, (start, end) in group:
            tokens.append(torch.arange(start, start + length, device=device).clamp_(max=end - 1))
            places[number] = torch.arange(at, at + end - start, device=device)
            at += length
    plan.blocks = tuple((len(group), lengths[group[-1][0]]) for group in groups)
    plan.tokens = torch.cat(tokens)
    plan.places = torch.cat([places[number] for number in range(len(lengths))])


class PackedAttention(torch.nn.Module):
    """Rope, and causal core attention of packed rows by one of the kinds below."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.scale, self.layer_number = softmax_scale, layer_number
        # Tokens that a query sees, itself among them; None: all up to it.
        self.window: int | None = None
        sizes = config.window_size  # of tokens before a query
        if is_layer_window_attention(sizes, config.window_attn_skip_freq, layer_number):
            self.window = sizes[0] + 1
        # Latent attention brings queries and keys that are turned.
        self._turns = not config.multi_latent_attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        """query [T, heads/tp, d], key [T, groups/tp, d], value [T, groups/tp, v]
        -> [T, heads/tp * v].
        """
        assert packed_seq_params is not None
        assert packed_seq_params.rotation is not None
        assert attention_bias is None
        if self._turns:
            rotation = packed_seq_params.rotation.of(self.window)
            query, key = (rotation.turned(x) for x in (query, key))
        size = value.size(-1)
        if size == key.size(-1):
            return self._attended(query, key, value, packed_seq_params)
        # Keys and values travel together, and kernels want them alike.
        padded = F.pad(value, (0, key.size(-1) - size))
        out = self._attended(query, key, padded, packed_seq_params)
        own: Tensor = out.unflatten(1, (-1, key.size(-1)))[..., :size]
        return own.flatten(1)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        if rows.seen is not None:
            return self.attend_seen(query, key, value, rows.seen).flatten(1)
        if rows.remembered is not None:
            return rows.remembered.attend(self, query, key, value)
        if rows.split is None:
            return self.attend(query, key, value, rows)
        return attend_split(query, key, value, rows.split, self.attend_half).flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        """The same, of queries and keys that are turned already."""
        raise NotImplementedError

    def attend_seen(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Seen | SeenBlocks
    ) -> Tensor:
        """[T, heads/tp, d] attention where responses share a prompt."""
        raise NotImplementedError

    def attend_half(self, query: Tensor, key: Tensor, value: Tensor, half: Half) -> Tensor:
        """[Q, heads, d] attention of chunks to all that stands in their sequences up to their end.

        query [Q, heads/tp, d], key and value [K, groups/tp, d].
        """
        raise NotImplementedError


class FlashAttention(PackedAttention):
    """torch's flash attention of sequences of any length: nothing is padded or repeated."""

    @property
    def _before_and_behind(self) -> tuple[int, int]:
        """The tokens before and behind a query that varlen_attn lets it see."""
        return CAUSAL if self.window is None else (self.window - 1, 0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        bounds, longest = rows.cu_seqlens_q, rows.max_seqlen_q
        attended = varlen_attn(
            query,
            key,
            value.contiguous(),  # a view would keep the product that it was cut from
            bounds,
            bounds,
            longest,
            longest,
            scale=self.scale,
            window_size=self._before_and_behind,
            enable_gqa=query.size(1) != key.size(1),
        )
        assert isinstance(attended, Tensor)
        return attended.flatten(1)

    def attend_seen(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Seen | SeenBlocks
    ) -> Tensor:
        assert isinstance(seen, Seen)
        return seen.attend(query, key, value, self.attend_half)

    def attend_half(self, query: Tensor, key: Tensor, value: Tensor, half: Half) -> Tensor:
        # Where queries are fewer than keys, the last query is at the last key.
        attended = varlen_attn(
            query,
            key,
            value,
            half.query_bounds,
            half.key_bounds,
            max(half.query_lengths),
            max(half.key_lengths),
            scale=self.scale,
            window_size=self._before_and_behind,
            enable_gqa=query.size(1) != key.size(1),
        )
        assert isinstance(attended, Tensor)
        return attended


class BlockAttention(PackedAttention):
    """torch's scaled_dot_product_attention of sequences that are padded into blocks.

    Under a causal mask no token sees the padding behind it, and the padded outputs are not read.
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedRows) -> Tensor:
        repeats = query.size(1) // key.size(1)
        sizes = [sequences * length for sequences, length in rows.blocks]
        padded = [Pad.apply(x, rows.tokens, rows.places).split(sizes) for x in (query, key, value)]
        attend = self._of_blocks([(length, length) for _, length in rows.blocks], rows.masks)
        outputs = []
        for shape, *parts in zip(rows.blocks, *padded, strict=True):
            q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
            if repeats > 1:
                k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            outputs.append(attend(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(outputs).index_select(0, rows.places)

    def attend_seen(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Seen | SeenBlocks
    ) -> Tensor:
        assert isinstance(seen, SeenBlocks)
        sizes = [(length, before + length) for _, length, before in seen.sizes]
        return seen.attend(query, key, value, self._of_blocks(sizes, seen.masks))

    def attend_half(self, query: Tensor, key: Tensor, value: Tensor, half: Half) -> Tensor:
        queries, keys, values = (
            [part.transpose(0, 1)[None] for part in x.split(lengths)]
            for x, lengths in (
                (query, half.query_lengths),
                (key, half.key_lengths),
                (value, half.key_lengths),
            )
        )
        most = max(half.query_lengths), max(half.key_lengths)
        mask = _mask(half.masks, most, query, self.window)
        attended = (
            self._up_to_own_end(*sequence, mask)
            for sequence in zip(queries, keys, values, strict=True)
        )
        return torch.cat([part[0].transpose(0, 1) for part in attended])

    def _of_blocks(self, sizes: Sequence[tuple[int, int]], masks: Masks) -> OfBlock:
        """What _up_to_own_end does of blocks of such sizes; without a mask where none is needed.

        sizes: (queries, keys) of a sequence of each block.
        """

        def is_plain(queries: int, keys: int) -> bool:
            return queries == keys and (self.window is None or keys <= self.window)

        masked = [size for size in sizes if not is_plain(*size)]
        most = max((q for q, _ in masked), default=0), max((k for _, k in masked), default=0)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if is_plain(query.size(2), key.size(2)):
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=self.scale
                )
            mask = _mask(masks, most, query, self.window)
            return self._up_to_own_end(query, key, value, mask)

        return attend

    def _up_to_own_end(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """[n, heads, q, d] of the last q tokens of sequences: [n, heads, q, d], [n, groups, k, d].

        Few at a time, since a mask is as large as the scores. The backward keeps it, so all parts
        of all layers of a kind have views of one. Keys that no query of a part sees are left out.
        """
        parts, before = [], key.size(2) - query.size(2)
        for start in range(0, query.size(2), QUERIES_AT_A_TIME):
            part = query[:, :, start : start + QUERIES_AT_A_TIME]
            end = before + start + part.size(2)
            first = 0 if self.window is None else max(0, before + start - self.window + 1)
            parts.append(
                F.scaled_dot_product_attention(
                    part,
                    key[:, :, first:end],
                    value[:, :, first:end],
                    attn_mask=mask[-part.size(2) :, first - end :],
                    scale=self.scale,
                    enable_gqa=query.size(1) != key.size(1),
                )
            )
        return torch.cat(parts, dim=2)


def _mask(made: Masks, most: tuple[int, int], like: Tensor, window: int | None) -> Tensor:
    """[queries, keys] to be added to scores of the last queries: 0 where they see a key, or -inf.

    They see those up to their own, or the newest ones of them. Its last rows and columns are the
    mask of fewer of both. made: those of this row. most: (queries, keys) of a sequence.
    """
    kind = like.dtype, window
    if kind not in made:
        queries, keys = min(QUERIES_AT_A_TIME, most[0]), most[1]
        if window is not None:
            keys = min(keys, queries + window - 1)
        hidden = torch.full((queries, keys), -torch.inf, dtype=like.dtype, device=like.device)
        own = keys - queries  # the diagonal of a query and its own key
        made[kind] = hidden.clone().triu_(own + 1)
        if window is not None:
            made[kind] += hidden.tril_(own - window)
    return made[kind]


ATTENTIONS: dict[str, type[PackedAttention]] = {"flash": FlashAttention, "blocks": BlockAttention}
"""By the names that ModelConfig.attention gives."""
