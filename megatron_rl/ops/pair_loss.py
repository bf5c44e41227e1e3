"""The loss of direct preference optimization, from per-token log-probabilities.

loss = sum_p weight_p * -log sigmoid(beta * margin_p),
margin_p = sum over the preferred response of (logprobs - ref_logprobs), less the other's.

Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PAIR_SUMS = ("pairs", "preferred", "margin")
"""Order of PairLoss.sums: pairs, those with a positive margin, and margins in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSpec:
    """The numbers of the loss."""

    beta: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairLoss:
    """A loss and what it measured on the way."""

    loss: Tensor  # [], with gradient, in the dtype of logprobs
    sums: Tensor  # [len(PAIR_SUMS)] float64, detached


def pair_loss(
    logprobs: Tensor,
    *,
    ref_logprobs: Tensor | None,
    signs: Tensor,
    weights: Tensor,
    pair_of: Tensor,
    num_pairs: int,
    spec: PairSpec,
) -> PairLoss:
    """Weighted loss of the pairs whose N tokens these are; tensors are [N].

    Args:
        logprobs: current, with gradient.
        ref_logprobs: None means the current ones, detached: every margin is exactly 0.
        signs: +1 on tokens of the preferred response, -1 on the other's.
        weights: the pair's share of the global loss, on each of its tokens.
        pair_of: int64, below num_pairs; both responses of a pair are here.
        num_pairs: may be 0: the loss is then 0, connected to logprobs.
        spec: beta.
    """
    ref = logprobs.detach() if ref_logprobs is None else ref_logprobs.to(logprobs.dtype)
    zeros = logprobs.new_zeros(num_pairs)
    margins = zeros.index_add(0, pair_of, signs.to(logprobs.dtype) * (logprobs - ref))
    weight_of_pair = zeros.index_copy(0, pair_of, weights.to(logprobs.dtype))
    loss = (weight_of_pair * F.softplus(-spec.beta * margins)).sum()
    with torch.no_grad():
        measured = [torch.ones_like(margins), margins > 0, margins]
        sums = torch.stack([values.double().sum() for values in measured])
    return PairLoss(loss=loss, sums=sums)
