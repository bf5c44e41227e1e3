"""Samples to packed rows; the only place that shifts by one.

A response token at position p of a sequence is predicted at entry p - 1 of the row, which is where
`LossTokens.at` points. Everything after this file speaks of the tokens that the loss is about.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rl.parallel.context import own_entries, padded
from megatron_rl.types import LossTokens, MicroBatch, RowPart, Sample


def pack(
    samples: Sequence[Sample],
    *,
    weight_of: Callable[[Sample], float],
    multiple: int,
    dtype: torch.dtype,
    device: torch.device,
    cp: int = 1,
    cp_rank: int = 0,
) -> MicroBatch:
    """One packed row of the samples, in their order, or a context-parallel rank's part of it.

    Args:
        samples: may be empty: the row is then padding alone, for a rank that has nothing to do
            while others have.
        weight_of: share of the global loss of each response token of a sample.
        multiple: the row's length is padded to a multiple of it (Layout.row_multiple).
        dtype: of weights, advantages and log-probs.
        device: of all tensors.
        cp: ranks that share every sequence, whose lengths are padded so that they can be cut.
        cp_rank: this rank's place among them.
    """
    lengths = list(padded([sample.num_tokens for sample in samples], cp))
    used = sum(lengths)
    padding = -used % multiple or (multiple if not used else 0)
    if padding:
        lengths.append(padding)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.zeros(used + padding, dtype=torch.int64)
    for sample, start in zip(samples, bounds.tolist(), strict=False):
        tokens[start : start + sample.num_tokens] = torch.cat(
            [sample.prompt_tokens, sample.response_tokens]
        )
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    loss = _loss_tokens(samples, bounds.tolist(), weight_of, dtype)
    experts = _experts(samples, bounds.tolist(), used + padding)
    part = None
    if cp > 1:
        own = own_entries(lengths, cp, cp_rank, torch.device("cpu"))
        tokens, position_ids = tokens[own], position_ids[own]
        experts = None if experts is None else experts[own]
        part = _part(own, loss.at, used + padding, device)
    groups: dict[int, int] = {}
    group_of = [groups.setdefault(sample.group_id, len(groups)) for sample in samples]
    responses = [len(sample.response_tokens) for sample in samples]
    return MicroBatch(
        tokens=tokens.to(device),
        position_ids=position_ids.to(device),
        cu_seqlens=bounds.to(device, torch.int32),
        lengths=tuple(lengths),
        trained_lengths=torch.tensor(
            [sample.num_tokens * sample.has_gradient for sample in samples] + [0] * bool(padding),
            dtype=torch.int64,
        ).to(device),
        loss=loss.to(device),
        part=part,
        response_lengths=torch.tensor(responses, dtype=torch.int64).to(device),
        group_of=torch.tensor(group_of, dtype=torch.int64).to(device),
        samples=tuple(samples),
        experts=experts.pin_memory() if experts is not None and device.type == "cuda" else experts,
    )


def _loss_tokens(
    samples: Sequence[Sample],
    starts: Sequence[int],
    weight_of: Callable[[Sample], float],
    dtype: torch.dtype,
) -> LossTokens:
    counts = torch.tensor([len(sample.response_tokens) for sample in samples], dtype=torch.int64)

    def per_token(values: Sequence[float]) -> Tensor:
        # By way of float64, which Python numbers are, so that they are rounded once.
        return torch.tensor(values, dtype=torch.float64).to(dtype).repeat_interleave(counts)

    firsts = [start + len(s.prompt_tokens) - 1 for s, start in zip(samples, starts, strict=False)]
    rollout = [s.rollout_logprobs for s in samples if s.rollout_logprobs is not None]
    at = [torch.arange(f, f + n) for f, n in zip(firsts, counts.tolist(), strict=True)]
    return LossTokens(
        at=_joined(at, torch.int64),
        targets=_joined([sample.response_tokens for sample in samples], torch.int64),
        weights=per_token([weight_of(sample) for sample in samples]),
        advantages=per_token([sample.advantage for sample in samples]),
        rollout_logprobs=_joined(rollout, dtype) if len(rollout) == len(samples) else None,
    )


def _experts(samples: Sequence[Sample], starts: Sequence[int], row_tokens: int) -> Tensor | None:
    """The experts [T, L, K] that the engine chose, where it told them of any sample."""
    told = [(s.experts, start) for s, start in zip(samples, starts, strict=False)]
    found = [(chosen, start) for chosen, start in told if chosen is not None]
    if not found:
        return None
    experts = torch.full((row_tokens, *found[0][0].shape[1:]), -1, dtype=torch.int16)
    for chosen, start in found:
        experts[start : start + len(chosen)] = chosen
    return experts


def _part(own: Tensor, at: Tensor, row_tokens: int, device: torch.device) -> RowPart:
    """The loss tokens among a rank's own [T] entries of a row."""
    entry_of = torch.full((row_tokens,), -1).scatter(0, own, torch.arange(len(own)))
    entries = entry_of[at]
    mine = torch.nonzero(entries >= 0)[:, 0]
    return RowPart(loss=mine.to(device), at=entries[mine].to(device))


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(part.to(dtype) for part in parts)])
