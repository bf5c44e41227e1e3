"""The two modules our layer spec puts in place of Megatron's: norm and packed attention."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.megatron.rope import Rope, Rotation
from megatron_rl.types import MicroBatch

MAX_WASTE = 1.25
"""Sequences padded to a common length differ from it by at most this factor, plus 16 tokens."""


class Norm(torch.nn.RMSNorm):
    """RMSNorm that works under sequence parallelism.

    The tag makes finalize_model_grads sum the weight's gradient over tensor-parallel ranks, each of
    which saw other tokens. Without it the gradient is wrong, and nothing says so.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _no_index() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class PackedRows(PackedSeqParams):
    """Megatron's parameters of a packed row, its rotation, and how it is padded into blocks.

    All of it is computed once per row and used by every local layer; Transformer Engine's take the
    row as it is. P: entries of all blocks.
    """

    rotation: Rotation | None = None
    blocks: tuple[tuple[int, int], ...] = ()  # (sequences, length) each
    tokens: Tensor = field(default_factory=_no_index)  # [P] int64 into the row; tails are repeated
    places: Tensor = field(default_factory=_no_index)  # [T] int64: tokens[places[t]] = t


def packed_rows(row: MicroBatch, rope: Rope | None) -> PackedRows:
    """Plan the attention of one row; rope: of local layers, without which nothing is planned."""
    cu_seqlens, max_seqlen = row.cu_seqlens, row.max_seqlen
    settings: dict[str, Any] = {
        "qkv_format": "thd",
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_kv": max_seqlen,
    }
    if rope is None:
        return PackedRows(**settings)
    bounds = cu_seqlens.tolist()
    device = cu_seqlens.device
    # By length, so that sequences of like length are neighbours and share a block.
    spans = sorted(itertools.pairwise(bounds), key=lambda s: s[1] - s[0])
    groups: list[list[tuple[int, int]]] = []
    for span in spans:
        if not groups or span[1] - span[0] > MAX_WASTE * (groups[-1][0][1] - groups[-1][0][0]) + 16:
            groups.append([])
        groups[-1].append(span)
    tokens: list[Tensor] = []
    places = torch.empty(bounds[-1], dtype=torch.int64)
    at = 0
    for group in groups:
        length = group[-1][1] - group[-1][0]
        starts = torch.tensor([lo for lo, _ in group])
        ends = torch.tensor([hi for _, hi in group])
        positions = starts[:, None] + torch.arange(length)
        real = positions < ends[:, None]
        flat = at + torch.arange(len(group) * length).view(len(group), length)
        places[positions[real]] = flat[real]
        tokens.append(torch.minimum(positions, ends[:, None] - 1).flatten())
        at += len(group) * length
    return PackedRows(
        **settings,
        rotation=rope.rotation(row.position_ids),
        blocks=tuple((len(group), group[-1][1] - group[-1][0]) for group in groups),
        tokens=torch.cat(tokens).to(device),
        places=places.to(device),
    )


class _Pad(torch.autograd.Function):
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


class PackedAttention(torch.nn.Module):
    """Rope and causal core attention of packed rows by torch's scaled_dot_product_attention.

    Sequences of like length are padded into one block; under a causal mask no token sees the
    padding behind it, and the padded outputs are not read.
    """

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
        self.scale = softmax_scale

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
        """query [T, heads/tp, d], key and value [T, groups/tp, d] -> [T, heads/tp * d]."""
        assert packed_seq_params is not None
        assert packed_seq_params.rotation is not None
        assert attention_bias is None
        rows, repeats = packed_seq_params, query.size(1) // key.size(1)
        query, key = (packed_seq_params.rotation.turned(x) for x in (query, key))
        sizes = [sequences * length for sequences, length in rows.blocks]
        padded = [_Pad.apply(x, rows.tokens, rows.places).split(sizes) for x in (query, key, value)]
        outputs = []
        for shape, *parts in zip(rows.blocks, *padded, strict=True):
            q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in parts)
            if repeats > 1:
                k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(outputs).index_select(0, rows.places)
