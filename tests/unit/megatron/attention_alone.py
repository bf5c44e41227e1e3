"""Both kinds of our attention against softmax by its formula, in a fresh process.

    python attention_alone.py

prints a JSON object. torch's variable-length attention runs on GPUs only; a stand-in that reads the
same arguments takes its place, so what is checked is what our module asks of it.
"""

import itertools
import json
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_rl.megatron.enter import enter
from megatron_rl.megatron.rope import Rope
from megatron_rl.parallel.context import own_entries
from megatron_rl.platforms.base import detect

LENGTHS = (5, 40, 1, 38, 17, 3, 90)
HEADS, GROUPS, WIDTH = 6, 2, 8
ROW_OF_CHUNKS = (6, 1200, 18)  # one sequence is longer than the queries that a mask is made for


def settings(window: int | None = None, *, latent: bool = False) -> Any:
    """What a configuration says of attention; layer 1 has the window, if there is one."""
    sizes = None if window is None else (window - 1, 0)
    return SimpleNamespace(
        multi_latent_attention=latent, window_size=sizes, window_attn_skip_freq=[1, 0]
    )


def by_formula(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """[q, heads, d] and [k, groups, d] twice -> [q, heads, d], ends at one token.

    window: tokens that a query sees, itself among them; None: all up to it.
    """
    group_of = torch.arange(query.size(1)) // (query.size(1) // key.size(1))
    scores = torch.einsum("ihd,jhd->hij", query, key[:, group_of]) * scale
    ages = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))
    hidden = (ages < 0) | (ages >= (len(key) if window is None else window))
    scores = scores.masked_fill(hidden, -torch.inf)
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
    lengths, seen = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max_q, max_k) == (max(lengths), max(seen))
    before, behind = window_size
    assert behind == 0
    window = None if before == -1 else before + 1
    parts = zip(query.split(lengths), key.split(seen), value.split(seen), strict=True)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    return torch.cat([by_formula(*part, scale, window) for part in parts])


class Saving(torch.autograd.Function):
    """Keeps for its backward what torch's kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = torch.zeros_like(query), torch.zeros(query.size(1), len(query))
        ctx.save_for_backward(query, key, value, out, lse)
        return out


class SavingKeys(torch.autograd.Function):
    """Keeps keys and values for its backward, which gives them as their own gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(key, value)
        return query.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = ctx.saved_tensors
        return gradients[0], key, value


def _counting(kept: dict[int, int]) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which kept gets the address and bytes of all memory that a backward keeps."""

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)


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
        part=None,
        shared=None,
    )


def rope_of(dtype: torch.dtype) -> Rope:
    rope = Rope.__new__(Rope)
    rope.frequencies, rope.dtype = 10.0 ** -torch.arange(WIDTH // 2), dtype
    rope.amplitude, rope.interleaved = 1.0, False
    return rope


def run(
    kind: str,
    scale: float | None,
    lengths: tuple[int, ...] = LENGTHS,
    window: int | None = None,
    layer: int = 1,
) -> list[Tensor]:
    """Output and gradient of a row."""
    from megatron_rl.megatron import attention

    mixed, *inputs = product(0, lengths)
    row, module = (
        row_of(lengths),
        attention.ATTENTIONS[kind](settings(window), layer, None, "", softmax_scale=scale),
    )
    rows = attention.packed_rows(row, rope_of(torch.float64), in_blocks=kind == "blocks")
    with mock.patch.object(attention, "varlen_attn", stand_in):
        out = module(*inputs, None, packed_seq_params=rows)
    (out * torch.arange(out.size(1))).sum().backward()
    assert mixed.grad is not None
    return [out.detach(), mixed.grad]


def error_of_latent_attention(kind: str) -> float:
    """Of queries and keys that are turned already, and values that are narrower."""
    from megatron_rl.megatron import attention

    drawn = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(sum(LENGTHS), HEADS, width, dtype=torch.float64, generator=drawn)
        for width in (WIDTH, WIDTH, WIDTH - 3)
    )
    latent = settings(latent=True)
    module = attention.ATTENTIONS[kind](latent, 1, None, "", softmax_scale=0.3)
    rows = attention.packed_rows(
        row_of(LENGTHS), rope_of(torch.float64), in_blocks=kind == "blocks"
    )
    with mock.patch.object(attention, "varlen_attn", stand_in):
        found = module(query, key, value, None, packed_seq_params=rows)
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    wanted = torch.cat([by_formula(*part, 0.3) for part in parts]).flatten(1)
    return largest_error([found], [wanted])


def run_split(
    kind: str, cp: int, lengths: tuple[int, ...], window: int | None = None
) -> list[Tensor]:
    """The same with every sequence cut over cp ranks, all of which are this process."""
    from megatron_rl.megatron import attention, split_attention

    mixed, *inputs = product(0, lengths)
    row, module = row_of(lengths), attention.ATTENTIONS[kind](settings(window), 1, None, "")
    own = [own_entries(lengths, cp, rank, torch.device("cpu")) for rank in range(cp)]
    parts = [[x[entries] for x in inputs] for entries in own]
    turn = rope_of(torch.float64).rotation
    sent = torch.cat(  # what the ranks' keys and values are in rank order
        [
            torch.stack([turn(row.position_ids[entries]).turned(key), value], 1)
            for entries, (_, key, value) in zip(own, parts, strict=True)
        ]
    )
    out = torch.zeros(sum(lengths), HEADS * WIDTH, dtype=torch.float64)
    for rank, entries in enumerate(own):
        there = {"tokens": row.tokens[entries], "position_ids": row.position_ids[entries]}
        part = SimpleNamespace(**{**vars(row), **there, "part": "some"})
        group: Any = SimpleNamespace(size=lambda: cp, rank=lambda rank=rank: rank)
        rows = attention.packed_rows(part, turn.__self__, in_blocks=True, sharing=group)
        gathered = mock.patch.object(split_attention, "_gathered", return_value=sent)
        with gathered, mock.patch.object(attention, "varlen_attn", stand_in):
            here = module(*parts[rank], None, packed_seq_params=rows)
        out = out.index_copy(0, entries, here)
    with mock.patch.object(split_attention, "_gathered", return_value=sent):  # the backward's own
        (out * torch.arange(out.size(1))).sum().backward()
    assert mixed.grad is not None
    return [out.detach(), mixed.grad]


def shared_row() -> Any:
    """Prompts of 5 and 30 tokens with three responses and one, a whole sequence, and padding."""
    from megatron_rl.types import SharedPrompts

    lengths = (5, 4, 40, 1, 30, 7, 12, 3)
    prompts = (None, 0, 0, 0, None, 4, None, None)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    runs = [torch.arange(*ends) for ends in itertools.pairwise(starts)]
    seen = [
        run if of is None else torch.cat([runs[of], run])
        for run, of in zip(runs, prompts, strict=True)
    ]
    row = row_of(lengths)
    row.position_ids = torch.cat(
        [
            torch.arange(len(keys) - len(run), len(keys))
            for run, keys in zip(runs, seen, strict=True)
        ]
    )
    row.shared = SharedPrompts(
        prompts=prompts,
        keys=torch.cat(seen),
        key_bounds=torch.tensor([0, *map(len, seen)]).cumsum(0).int(),
        key_lengths=tuple(map(len, seen)),
    )
    return row


def run_shared(kind: str, scale: float | None, window: int | None = None) -> list[Tensor]:
    """Output and gradient of a row whose responses share prompts."""
    from megatron_rl.megatron import attention

    row = shared_row()
    mixed, *inputs = product(0, row.lengths)
    module = attention.ATTENTIONS[kind](settings(window), 1, None, "", softmax_scale=scale)
    rows = attention.packed_rows(row, rope_of(torch.float64), in_blocks=kind == "blocks")
    with mock.patch.object(attention, "varlen_attn", stand_in):
        out = module(*inputs, None, packed_seq_params=rows)
    (out * torch.arange(out.size(1))).sum().backward()
    assert mixed.grad is not None
    return [out.detach(), mixed.grad]


def expected_shared(scale: float | None, window: int | None = None) -> list[Tensor]:
    """The same, each response behind a prompt of its own."""
    row = shared_row()
    mixed, query, key, value = product(0, row.lengths)
    query, key = (turned(x, row.position_ids) for x in (query, key))
    scale = WIDTH**-0.5 if scale is None else scale
    runs = torch.arange(len(query)).split(row.lengths)
    seen = row.shared.keys.split(row.shared.key_lengths)
    out = torch.cat(
        [
            by_formula(query[run], key[keys], value[keys], scale, window)
            for run, keys in zip(runs, seen, strict=True)
        ]
    ).flatten(1)
    (out * torch.arange(out.size(1))).sum().backward()
    assert mixed.grad is not None
    return [out.detach(), mixed.grad]


def kept_of_shared_prompts() -> int:
    """Bytes of picked keys and values that a kernel which keeps both makes a row keep."""
    from megatron_rl.megatron import attention

    row = shared_row()
    rows = attention.packed_rows(row, rope_of(torch.float64), in_blocks=False)
    kept: dict[int, int] = {}
    _, query, key, value = product(0, row.lengths)
    key, value = (x.detach().clone().requires_grad_() for x in (key, value))
    with _counting(kept):
        out = rows.seen.attend(query, key, value, lambda q, k, v, _: SavingKeys.apply(q, k, v))
    given = torch.autograd.grad(out.sum(), (key, value))
    counts = row.shared.keys.bincount()[:, None, None]  # each entry is given what it is, so often
    assert all(torch.allclose(g, x * counts) for g, x in zip(given, (key, value), strict=True))
    return sum(kept.values()) - rows.seen.half.keys.untyped_storage().nbytes()  # of all layers


def kept_of_a_part(cp: int) -> int:
    """Bytes of gathered keys and values that a kernel which keeps both makes a part keep."""
    from megatron_rl.megatron import split_attention

    lengths = (8 * cp, 16 * cp)
    group: Any = SimpleNamespace(size=lambda: cp, rank=lambda: 0)
    split = split_attention.split_of(lengths, row_of(lengths).cu_seqlens, group)
    _, query, key, value = product(0, tuple(length // cp for length in lengths))
    kept: dict[int, int] = {}
    repeated = mock.patch.object(
        split_attention, "_gathered", lambda own, _: own.repeat(cp, 1, 1, 1)
    )
    with repeated:
        both = split_attention._gathered(torch.stack([key, value], 1), group)
        own = split_attention._Kept(torch.stack([key, value], 1).detach(), group)
        for half in split.halves:
            seen = both.index_select(0, half.keys)
            with (
                _counting(kept),
                own.in_place_of(seen, half.keys),
            ):
                out = SavingKeys.apply(query.index_select(0, half.queries), seen[:, 0], seen[:, 1])
            (given,) = torch.autograd.grad(out.sum(), seen)
            assert torch.equal(given, seen)  # what the backward was given is what was seen
    assert own._both is None  # nothing of the whole row is left
    return sum(kept.values())


def turned(heads: Tensor, position_ids: Tensor) -> Tensor:
    """Queries or keys at their positions."""
    frequencies = rope_of(torch.float64).frequencies
    turn = torch.exp(1j * torch.outer(position_ids.float(), frequencies).double())
    halves = torch.complex(*heads.split(WIDTH // 2, dim=2)) * turn[:, None]
    return torch.cat([halves.real, halves.imag], dim=2)


def expected(
    scale: float | None, lengths: tuple[int, ...] = LENGTHS, window: int | None = None
) -> list[Tensor]:
    """The same, sequence by sequence, with angles of complex numbers."""
    mixed, query, key, value = product(0, lengths)
    query, key = (turned(x, row_of(lengths).position_ids) for x in (query, key))
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    scale = WIDTH**-0.5 if scale is None else scale
    out = torch.cat([by_formula(*part, scale, window) for part in parts]).flatten(1)
    (out * torch.arange(out.size(1))).sum().backward()
    assert mixed.grad is not None
    return [out.detach(), mixed.grad]


def kept_by_flash() -> tuple[int, int]:
    """Bytes that attention keeps of a row, and those that are counted from sizes."""
    from megatron_rl.megatron import attention

    tokens = sum(LENGTHS)
    rows = attention.packed_rows(row_of(LENGTHS), rope_of(torch.float64), in_blocks=False)
    module = attention.FlashAttention(settings(), 1, None, "")
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


def errors_of_windows() -> dict[str, float]:
    """Of layers with a window, and of one without it beside them."""
    told = {}
    for kind in ("flash", "blocks"):
        for window, row in ((7, LENGTHS), (1, (4, 4)), (90, LENGTHS), (700, ROW_OF_CHUNKS)):
            error = largest_error(run(kind, None, row, window), expected(None, row, window))
            told[f"windows of {kind}, {window} in {row}"] = error
        for cp, window in ((2, 5), (3, 700), (3, 200)):
            found = run_split(kind, cp, ROW_OF_CHUNKS if cp == 3 else (4, 40, 12), window)
            wanted = expected(None, ROW_OF_CHUNKS if cp == 3 else (4, 40, 12), window)
            told[f"windows of {kind}, {window} at cp {cp}"] = largest_error(found, wanted)
        for window in (3, 7, 33):
            found, wanted = run_shared(kind, None, window), expected_shared(None, window)
            told[f"windows of {kind}, {window} behind prompts"] = largest_error(found, wanted)
        found, wanted = run(kind, None, LENGTHS, 7, layer=2), expected(None, LENGTHS)
        told[f"windows of {kind}, the other layer"] = largest_error(found, wanted)
    return told


def masks_of_next_tokens() -> dict[str, list[list[bool]]]:
    """Which positions the tokens at 0 and 4 see."""
    from megatron_rl.megatron.kv_cache import NextTokens

    slots: Any = torch.arange(2)
    cache: Any = None
    tokens = NextTokens(cache=cache, slots=slots, positions=torch.tensor([0, 4]), length=5)
    return {
        str(window): (tokens.mask(window, torch.float64)[:, 0, 0] == 0).tolist()
        for window in (None, 3, 8)
    }


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
    told |= {
        f"split {kind}, cp {cp}": largest_error(run_split(kind, cp, row), expected(None, row))
        for kind in ("flash", "blocks")
        for cp, row in ((2, (4, 40, 12)), (3, ROW_OF_CHUNKS), (4, (8,)))
    }
    told |= {
        f"shared {kind}, scale {scale}": largest_error(
            run_shared(kind, scale), expected_shared(scale)
        )
        for kind in ("flash", "blocks")
        for scale in (None, 0.5)
    }
    told |= errors_of_windows()
    found = {
        "next": masks_of_next_tokens(),
        "shared": kept_of_shared_prompts(),
        "split": kept_of_a_part(4),
        "errors": told,
        "latent": {kind: error_of_latent_attention(kind) for kind in ("flash", "blocks")},
        "kept": kept_by_flash(),
        "te": of_transformer_engine(),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
