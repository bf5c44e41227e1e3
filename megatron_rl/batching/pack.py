"""Samples to packed rows; the only place that shifts by one.

A response token at position p of a sequence is predicted at entry p - 1 of the row, which is where
`LossTokens.at` points. Everything after this file speaks of the tokens that the loss is about.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rl.types import LossTokens, MicroBatch, Sample


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
    sequences = [torch.cat([s.prompt_tokens, s.response_tokens]) for s in samples]
    tokens = torch.cat([*sequences, torch.zeros(padding, dtype=torch.int64)])
    groups: dict[int, int] = {}
    group_of = [groups.setdefault(sample.group_id, len(groups)) for sample in samples]
    responses = [len(sample.response_tokens) for sample in samples]
    return MicroBatch(
        tokens=tokens.to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
        cu_seqlens=bounds.to(device, torch.int32),
        lengths=tuple(lengths),
        loss=_loss_tokens(samples, bounds.tolist(), weight_of, dtype, device),
        response_lengths=torch.tensor(responses, dtype=torch.int64).to(device),
        group_of=torch.tensor(group_of, dtype=torch.int64).to(device),
        samples=tuple(samples),
    )


def _loss_tokens(
    samples: Sequence[Sample],
    starts: Sequence[int],
    weight_of: Callable[[Sample], float],
    dtype: torch.dtype,
    device: torch.device,
) -> LossTokens:
    counts = torch.tensor([len(sample.response_tokens) for sample in samples], dtype=torch.int64)

    def per_token(values: Sequence[float]) -> Tensor:
        # By way of float64, which Python numbers are, so that they are rounded once.
        return torch.tensor(values, dtype=torch.float64).to(dtype).repeat_interleave(counts)

    firsts = [start + len(s.prompt_tokens) - 1 for s, start in zip(samples, starts, strict=False)]
    rollout = [s.rollout_logprobs for s in samples if s.rollout_logprobs is not None]
    at = [torch.arange(f, f + n) for f, n in zip(firsts, counts.tolist(), strict=True)]
    tokens = LossTokens(
        at=_joined(at, torch.int64),
        targets=_joined([sample.response_tokens for sample in samples], torch.int64),
        weights=per_token([weight_of(sample) for sample in samples]),
        advantages=per_token([sample.advantage for sample in samples]),
        rollout_logprobs=_joined(rollout, dtype) if len(rollout) == len(samples) else None,
    )
    return tokens.to(device)


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(part.to(dtype) for part in parts)])
