"""Samples to packed rows; the only place that shifts by one.

A response token at position p of a sequence is predicted at entry p - 1, so that entry carries its
weight, advantage and log-probs. Everything after this file speaks in entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.types import MicroBatch, Sample


def pack(
    samples: Sequence[Sample],
    *,
    weight_of: Callable[[Sample], float],
    multiple: int,
    dtype: torch.dtype,
    device: torch.device,
) -> MicroBatch:
    """One packed row of the samples, in their order.

    Args:
        samples: may be empty: the row is then padding alone, for a rank that has nothing to do
            while others have.
        weight_of: share of the global loss of each response token of a sample.
        multiple: the row's length is padded to a multiple of it (sequence parallelism).
        dtype: of weights, advantages and log-probs.
        device: of all tensors.
    """
    lengths = [sample.num_tokens for sample in samples]
    used = sum(lengths)
    padding = -used % multiple or (multiple if not used else 0)
    if padding:
        lengths.append(padding)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.zeros(used + padding, dtype=torch.int64)
    weights = torch.zeros(used + padding, dtype=dtype)
    advantages = torch.zeros(used + padding, dtype=dtype)
    rollout = torch.zeros(used + padding, dtype=dtype)
    rows: list[Tensor] = []
    first_rows: list[int] = []
    num_rows = 0
    for sample, start in zip(samples, bounds.tolist(), strict=False):
        response = len(sample.response_tokens)
        first = start + len(sample.prompt_tokens) - 1  # predicts the first response token
        tokens[start : first + 1] = sample.prompt_tokens
        tokens[first + 1 : first + 1 + response] = sample.response_tokens
        weights[first : first + response] = weight_of(sample)
        advantages[first : first + response] = sample.advantage
        if sample.rollout_logprobs is not None:
            rollout[first : first + response] = sample.rollout_logprobs.to(dtype)
        rows.append(torch.arange(first, first + response))
        first_rows.append(num_rows)
        num_rows += response
    has_rollout = all(sample.rollout_logprobs is not None for sample in samples)
    return MicroBatch(
        tokens=tokens.to(device),
        targets=torch.cat([tokens[1:], tokens.new_zeros(1)]).to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
        cu_seqlens=bounds.to(device, torch.int32),
        max_seqlen=max(lengths),
        loss_rows=(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)).to(device),
        weights=weights.to(device),
        advantages=advantages.to(device),
        old_logprobs=None,
        rollout_logprobs=rollout.to(device) if has_rollout else None,
        ref_logprobs=None,
        samples=tuple(samples),
        first_loss_rows=tuple(first_rows),
    )


def with_old_logprobs(batch: MicroBatch, values: Tensor) -> MicroBatch:
    """The batch with old_logprobs; values [N] at its loss rows."""
    return replace(batch, old_logprobs=_spread(values, batch))


def with_ref_logprobs(batch: MicroBatch, values: Tensor) -> MicroBatch:
    """The batch with ref_logprobs; values [N] at its loss rows."""
    return replace(batch, ref_logprobs=_spread(values, batch))


def with_token_advantages(
    batch: MicroBatch, advantages: Tensor, *, old_values: Tensor, returns: Tensor
) -> MicroBatch:
    """The batch with what gae gives; all [N] at its loss rows."""
    return replace(
        batch,
        advantages=_spread(advantages, batch),
        old_values=_spread(old_values, batch),
        returns=_spread(returns, batch),
    )


def _spread(values: Tensor, batch: MicroBatch) -> Tensor:
    spread = torch.zeros_like(batch.weights)
    spread[batch.loss_rows] = values.to(spread)
    return spread
