"""The gated delta rule (arXiv:2412.06464) over the sequences of a packed row, in plain PyTorch.

A head has a state S, a matrix [k, v] that a key maps to a value. At every token it decays by exp(g)
and learns, by the share beta, what the token's key maps to: S <- exp(g) (S - beta k (k^T S)) +
beta k v^T. The token's output is q^T S.

Inside of chunks of tokens this is a triangular system of equations, which all chunks of a row solve
at once; from chunk to chunk it is a product of matrices. Every sequence begins with its own state:
zeros, or, where responses follow a prompt that stands once, the prompt's last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.megatron.gathering import repeated

CHUNK = 64  # tokens


@dataclass(frozen=True)
class Level:
    """Runs of a row that can go through the rule at once, as chunks: first those of all runs.

    N: chunks of C tokens. Runs are in the order of falling lengths.
    """

    tokens: Tensor  # [N * C] int64 into the row; tails repeat a run's last token
    is_own: Tensor  # [N, C] bool: no such tail
    places: Tensor  # [T of these runs] int64: tokens[places[t]] = t, in the order of `runs`
    counts: tuple[int, ...]  # of runs that have a first chunk, a second one, ...
    runs: tuple[int, ...]
    origins: Tensor | None  # [runs] int64: places in the level before; None: states begin with 0


@dataclass(frozen=True)
class DeltaRow:
    """What gated delta nets have to know of a packed row; the same in every layer."""

    levels: tuple[Level, ...]
    order: Tensor  # [T] int64: of each token among those of all levels
    before: Tensor  # [kernel - 1, T] int64 into the row: the token before, the one before that, ...
    has_before: Tensor  # [kernel - 1, T, 1] bool


def delta_row(
    lengths: Sequence[int],
    origins: Sequence[int | None],
    *,
    kernel: int,
    device: torch.device,
) -> DeltaRow:
    """Plan a row of runs of these lengths.

    origins: the run, itself without one, behind which each stands; None: it begins a sequence.
    Indices are made where they are used: a copy from the host would wait for the device.
    """
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    levels: list[Level] = []
    for is_behind in (False, True):
        runs = [run for run, origin in enumerate(origins) if (origin is not None) == is_behind]
        if runs:
            runs.sort(key=lambda run: -lengths[run])
            former = levels[0].runs if is_behind else None
            levels.append(_level(runs, starts, origins, former, device))
    order = {}
    at = 0
    for level in levels:
        for run in level.runs:
            order[run] = torch.arange(at, at + lengths[run], device=device)
            at += lengths[run]
    before, has_before = _before(starts, origins, kernel, device)
    return DeltaRow(
        levels=tuple(levels),
        order=torch.cat([order[run] for run in range(len(lengths))]),
        before=before,
        has_before=has_before,
    )


def _level(
    runs: Sequence[int],
    starts: Sequence[int],
    origins: Sequence[int | None],
    former: tuple[int, ...] | None,
    device: torch.device,
) -> Level:
    lengths = [starts[run + 1] - starts[run] for run in runs]
    steps = -(-lengths[0] // CHUNK)
    counts = [sum(length > step * CHUNK for length in lengths) for step in range(steps)]
    tokens, is_own = [], []
    for step, count in enumerate(counts):
        for run in runs[:count]:
            first = starts[run] + step * CHUNK
            own = torch.arange(first, first + CHUNK, device=device)
            tokens.append(own.clamp(max=starts[run + 1] - 1))
            is_own.append(own < starts[run + 1])
    places = []
    firsts = [sum(counts[:step]) for step in range(steps)]
    for number, length in enumerate(lengths):
        for step in range(-(-length // CHUNK)):
            chunk = firsts[step] + number
            left = min(CHUNK, length - step * CHUNK)
            places.append(torch.arange(chunk * CHUNK, chunk * CHUNK + left, device=device))
    behind = None
    if former is not None:
        place_of = {run: place for place, run in enumerate(former)}
        found = [place_of[origin] for run in runs if (origin := origins[run]) is not None]
        behind = torch.cat([torch.full((1,), place, device=device) for place in found])
    return Level(
        tokens=torch.cat(tokens),
        is_own=torch.stack(is_own),
        places=torch.cat(places),
        counts=tuple(counts),
        runs=tuple(runs),
        origins=behind,
    )


def _before(
    starts: Sequence[int], origins: Sequence[int | None], kernel: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The entries of the tokens that the convolution sees before each, and which there are."""
    entries, are_there = [], []
    for run, origin in enumerate(origins):
        own = torch.arange(starts[run], starts[run + 1], device=device)
        for_run, there = [], []
        for back in range(1, kernel):
            entry = own - back
            missing = entry < starts[run]
            if origin is not None:  # they are the last ones of the run before
                entry = torch.where(missing, entry - starts[run] + starts[origin + 1], entry)
                missing &= entry < starts[origin]
            for_run.append(entry.masked_fill(missing, starts[run]))
            there.append(~missing)
        if kernel > 1:
            entries.append(torch.stack(for_run))
            are_there.append(torch.stack(there))
    if kernel == 1:
        nothing = torch.empty(0, starts[-1], dtype=torch.int64, device=device)
        return nothing, nothing.bool()[..., None]
    return torch.cat(entries, 1), torch.cat(are_there, 1)[..., None]


def convolved(mixed: Tensor, weight: Tensor, row: DeltaRow) -> Tensor:
    """[T, rows] of the causal convolution of each row by itself; weight [rows, 1, kernel]."""
    out = mixed * weight[:, 0, -1]
    for back, (entries, is_there) in enumerate(zip(row.before, row.has_before, strict=True), 1):
        out = out + repeated(mixed, entries) * is_there * weight[:, 0, -1 - back]
    return out


def by_chunks(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, share: Tensor, row: DeltaRow
) -> tuple[Tensor, Tensor]:
    """The outputs [T, heads, v], and the last states of the first level's runs, in its order.

    query, key [T, heads, k]; value [T, heads, v]; decay (g) and share (beta) [T, heads].
    """
    outputs, last = [], torch.empty(0)
    for level in row.levels:
        parts = (
            _Padded.apply(x, level.tokens, level.places).unflatten(0, level.is_own.shape)
            for x in (query, key, value, decay, share)
        )
        q, k, v, g, beta = (part.transpose(1, 2) for part in parts)
        is_own = level.is_own[:, None]
        g, beta = g.masked_fill(~is_own, 0), beta.masked_fill(~is_own, 0)
        shape = (len(level.runs), query.size(1), key.size(2), value.size(2))
        origins = level.origins
        state = q.new_zeros(shape) if origins is None else repeated(last, origins)
        out, state = _through_chunks(q, k, v, g, beta, state, level.counts)
        if origins is None:
            last = state
        outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, level.places))
    return torch.cat(outputs).index_select(0, row.order), last


class _Padded(torch.autograd.Function):
    """[T, ...] -> [N * C, ...]; no gradient comes from tails, which nothing is read of."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, places)
        ctx.length = len(row)
        return row.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (tokens, places), (gradient,) = ctx.saved_tensors, gradients
        row = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        row.index_copy_(0, tokens.index_select(0, places), gradient.index_select(0, places))
        return row, None, None


def _through_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """All [N, heads, C, ...]; state [runs, heads, k, v] -> outputs [N, heads, C, v], states."""
    size = q.size(2)
    decayed = g.cumsum(-1)  # since the chunk's start
    upper = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (decayed[..., :, None] - decayed[..., None, :]).masked_fill(upper, -torch.inf).exp()
    system = (k * beta[..., None]) @ k.transpose(-1, -2) * between
    values, keys = torch.linalg.solve_triangular(
        system.tril(-1),
        torch.cat([v, k * decayed.exp()[..., None]], dim=-1) * beta[..., None],
        upper=False,
        unitriangular=True,
    ).split([v.size(-1), k.size(-1)], dim=-1)
    within = q @ k.transpose(-1, -2) * between
    of_state = q * decayed.exp()[..., None]
    to_end = k * (decayed[..., -1:] - decayed).exp()[..., None]
    whole = decayed[..., -1].exp()[..., None, None]
    outputs, at = [], 0
    for count in counts:
        part = slice(at, at + count)
        before = state[:count]
        learnt = values[part] - keys[part] @ before
        outputs.append(of_state[part] @ before + within[part] @ learnt)
        after = before * whole[part] + to_end[part].transpose(-1, -2) @ learnt
        state = after if count == len(state) else torch.cat([after, state[count:]])
        at += count
    return torch.cat(outputs), state


def next_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, share: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of each of n sequences: outputs [n, heads, v], and states [n, heads, k, v]."""
    state = state * decay.exp()[..., None, None]
    known = torch.einsum("nhkv,nhk->nhv", state, key)
    learnt = (value - known) * share[..., None]
    state = state + key[..., None] * learnt[..., None, :]
    return torch.einsum("nhkv,nhk->nhv", state, query), state
