"""Advantages and returns of every token: from the critic's values, and from a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_rl.algorithms.advantage import SumOverRanks, whiten
from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.gae import gae, token_rewards
from megatron_rl.types import MicroBatch, MiniBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """An iteration's batches with token advantages, and the KL that rewards paid for."""

    batches: list[MiniBatch]
    responses: int  # over all ranks
    kl_mean: float  # of old to reference policy, nats per response; 0 without a KL in the reward


def estimate(
    batches: Sequence[MiniBatch],
    values: Sequence[Sequence[Tensor] | None],
    config: AlgorithmConfig,
    *,
    kl_coef: float,
    sum_over_ranks: SumOverRanks,
) -> Estimated:
    """Advantages and returns of every token, whitened over all ranks; every rank calls it.

    Args:
        batches: of the iteration; a sample's advantage holds its reward.
        values: [N] of each micro-batch of each of them; None off the last stage and for
            mini-batches without samples, which stay as they are.
        config: gamma, gae_lambda, std_ddof, std_eps.
        kl_coef: of the KL in the reward.
        sum_over_ranks: a float64 tensor -> its sum over data-parallel ranks.
    """
    valued = [(b, v) for b, v in zip(batches, values, strict=True) if v is not None]
    rows = [row for batch, _ in valued for row in batch.microbatches]
    flat = [value.cpu().double() for _, part in valued for value in part]
    estimates = [
        _of_row(row, value, config, kl_coef) for row, value in zip(rows, flat, strict=True)
    ]
    raw = torch.cat([advantages for advantages, _ in estimates] or [torch.empty(0).double()])
    whitened = whiten(
        raw,
        torch.ones_like(raw),
        std_ddof=config.std_ddof,
        std_eps=config.std_eps,
        sum_over_ranks=sum_over_ranks,
    ).split([len(advantages) for advantages, _ in estimates])
    finished = iter(
        row.with_loss(advantages=advantages, old_values=value, returns=returns)
        for row, advantages, value, (_, returns) in zip(
            rows, whitened, flat, estimates, strict=True
        )
    )
    kl_sum = sum((_kl_sum(row) for row in rows), 0.0) if kl_coef else 0.0
    total = sum_over_ranks(
        torch.tensor([sum(len(row.samples) for row in rows), kl_sum], dtype=torch.float64)
    )
    count, kl = total.tolist()
    return Estimated(
        batches=[
            batch
            if part is None
            else replace(batch, microbatches=tuple(next(finished) for _ in batch.microbatches))
            for batch, part in zip(batches, values, strict=True)
        ],
        responses=int(count),
        kl_mean=kl / count if count else 0.0,
    )


def with_distillation(batches: Sequence[MiniBatch], coef: float) -> list[MiniBatch]:
    """The batches with coef (ref_logprobs - old_logprobs) added to each token's advantage.

    Its mean over responses that the policy sampled is minus coef times KL(policy || teacher).
    Without both log-probs, which are on the last stage only, a row stays as it is.
    Source: Gu et al. 2023, arXiv:2306.08543, eq. 5, without the reward of later tokens; Agarwal et
    al. 2023, arXiv:2306.13649, section 3.
    """
    if not coef:
        return list(batches)
    return [
        replace(batch, microbatches=tuple(_taught(row, coef) for row in batch.microbatches))
        for batch in batches
    ]


def _taught(row: MicroBatch, coef: float) -> MicroBatch:
    teacher, old = row.loss.ref_logprobs, row.loss.old_logprobs
    if teacher is None or old is None:
        return row
    return row.with_loss(advantages=row.loss.advantages + coef * (teacher - old))


def _of_row(
    row: MicroBatch, values: Tensor, config: AlgorithmConfig, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [N] of the row's loss tokens, float64 on the host."""
    lengths = torch.tensor([s.num_response_tokens for s in row.samples], dtype=torch.int64)
    if not len(lengths):
        return values, values
    rewards = token_rewards(
        torch.tensor([sample.advantage for sample in row.samples], dtype=torch.float64),
        lengths,
        old_logprobs=_padded(_on_host(row.loss.old_logprobs), lengths) if kl_coef else None,
        ref_logprobs=_padded(_on_host(row.loss.ref_logprobs), lengths) if kl_coef else None,
        kl_coef=kl_coef,
    )
    advantages, returns = gae(
        rewards, _padded(values, lengths), gamma=config.gamma, lam=config.gae_lambda
    )
    is_token = torch.arange(rewards.size(1)) < lengths[:, None]
    return advantages[is_token], returns[is_token]


def _kl_sum(row: MicroBatch) -> float:
    difference = _on_host(row.loss.old_logprobs) - _on_host(row.loss.ref_logprobs)
    return float(difference.sum())


def _on_host(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.cpu().double()


def _padded(values: Tensor, lengths: Tensor) -> Tensor:
    return pad_sequence(list(values.split(lengths.tolist())), batch_first=True)
