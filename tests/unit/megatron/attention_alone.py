"""Both kinds of our attention against softmax by its formula, in a fresh process.

    python attention_alone.py

prints a JSON object. torch's variable-length attention runs on GPUs only; a stand-in that reads the
same arguments takes its place, so what is checked is what our module asks of it.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_rl.megatron.enter import enter
from megatron_rl.megatron.rope import Rope
from megatron_rl.platforms.base import detect

LENGTHS = (5, 40, 1, 38, 17, 3, 90)
HEADS, GROUPS, WIDTH = 6, 2, 8


def by_formula(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> Tensor:
    """[L, heads, d] and [L, groups, d] twice -> [L, heads, d]."""
    group_of = torch.arange(query.size(1)) // (query.size(1) // key.size(1))
    scores = torch.einsum("ihd,jhd->hij", query, key[:, group_of]) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), value[:, group_of])


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn, slowly; where it would refuse, so does this."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.size(1) == key.size(1)
    assert value.stride(-1) == 1
    lengths = cu_seq_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return torch.cat([by_formula(*part, scale, window_size == (-1, 0)) for part in parts])


class Saving(torch.autograd.Function):
    """Keeps for its backward what torch's kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = torch.zeros_like(query), torch.zeros(query.size(1), len(query))
        ctx.save_for_backward(query, key, value, out, lse)
        return out


def product(seed: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values as views of the product that Megatron-Core cuts them from."""
    drawn = torch.Generator().manual_seed(seed)
    width = (HEADS // GROUPS + 2) * WIDTH
    mixed = torch.randn(sum(lengths), GROUPS, width, dtype=torch.float64, generator=drawn)
    mixed.requires_grad_()
    sizes = [HEADS // GROUPS * WIDTH, WIDTH, WIDTH]
    query, key, value = mixed.split(sizes, dim=2)
    return mixed, query.reshape(sum(lengths), HEADS, WIDTH), key, value


def row_of(lengths: tuple[int, ...]) -> Any:
    return SimpleNamespace(
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        lengths=lengths,
        max_seqlen=max(lengths),
        tokens=torch.zeros(sum(lengths), dtype=torch.int64),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
    )


def rope_of(dtype: torch.dtype) -> Rope:
    rope = Rope.__new__(Rope)
    rope.frequencies, rope.dtype = 10.0 ** -torch.arange(WIDTH // 2), dtype
    return rope


def run(kind: str, scale: float | None, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Output and gradient of a row."""
    from megatron_rl.megatron import attention

    mixed, *inputs = product(0, lengths)
    row, module = (
        row_of(lengths),
        attention.ATTENTIONS[kind](None, 1, None, "", softmax_scale=scale),
    )
    rows = attention.packed_rows(row, rope_of(torch.float64), in_blocks=kind == "blocks")
    with mock.patch.object(attention, "varlen_attn", stand_in):
        out = module(*inputs, None, packed_seq_params=rows)
    (out * torch.arange(out.size(1))).sum().backward()
    assert mixed.grad is not None
    return [out.detach(), mixed.grad]


def expected(scale: float | None, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """The same, sequence by sequence, with angles of complex numbers."""
    mixed, query, key, value = product(0, lengths)
    frequencies = rope_of(torch.float64).frequencies
    turn = torch.exp(1j * torch.outer(row_of(lengths).position_ids.float(), frequencies).double())

    def turned(heads: Tensor) -> Tensor:
        halves = torch.complex(*heads.split(WIDTH // 2, dim=2)) * turn[:, None]
        return torch.cat([halves.real, halves.imag], dim=2)

    parts = zip(*(x.split(lengths) for x in (turned(query), turned(key), value)), strict=True)
    scale = WIDTH**-0.5 if scale is None else scale
    out = torch.cat([by_formula(*part, scale, True) for part in parts]).flatten(1)
    (out * torch.arange(out.size(1))).sum().backward()
    assert mixed.grad is not None
    return [out.detach(), mixed.grad]


def kept_by_flash() -> tuple[int, int]:
    """Bytes that attention keeps of a row, and those that are counted from sizes."""
    from megatron_rl.megatron import attention

    tokens = sum(LENGTHS)
    rows = attention.packed_rows(row_of(LENGTHS), rope_of(torch.float64), in_blocks=False)
    module = attention.FlashAttention(None, 1, None, "")
    once = {x.untyped_storage().data_ptr() for x in (rows.rotation.cos, rows.rotation.sin)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in once:  # of a row, and not of a layer
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    saving = mock.patch.object(
        attention, "varlen_attn", lambda q, k, v, *_, **__: Saving.apply(q, k, v)
    )
    _, *inputs = product(0, LENGTHS)
    with saving, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(*inputs, None, packed_seq_params=rows)
    widths = 2 * (HEADS + GROUPS) * WIDTH
    return sum(kept.values()), tokens * (8 * widths + 4 * HEADS)


def of_transformer_engine() -> bool:
    """A row is left as it is."""
    from megatron_rl.megatron.attention import packed_rows

    row = row_of((3, 2))
    rows = packed_rows(row, None, in_blocks=False)
    is_shared = rows.cu_seqlens_q is rows.cu_seqlens_kv is row.cu_seqlens
    return is_shared and (rows.rotation, rows.blocks, rows.tokens.numel()) == (None, (), 0)


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)
    )


def main() -> None:
    enter(detect())
    rows = {"many": LENGTHS, "one": (7,), "one token": (1,), "equal": (4, 4, 4)}
    told: dict[str, Any] = {
        f"{kind}, {name}": largest_error(run(kind, None, row), expected(None, row))
        for kind in ("flash", "blocks")
        for name, row in rows.items()
    }
    told |= {
        f"{kind}, scaled": largest_error(run(kind, 0.5), expected(0.5))
        for kind in ("flash", "blocks")
    }
    found = {"errors": told, "kept": kept_by_flash(), "te": of_transformer_engine()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
