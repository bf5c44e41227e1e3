"""The loss of packed rows that an optimizer step minimises: over tokens, or over pairs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.objectives.dpo import PAIR_SUMS, Dpo, pair_metrics
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.objective import Objective, TokenObjective
from megatron_rl.objectives.token_loss import linear_policy_loss, metrics_from, token_loss
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import EXTREMA, SUMS, MeasuredLoss, SharedTerms
from megatron_rl.types import LossTokens, MicroBatch

Whole = Callable[[Tensor, MicroBatch], Tensor]
"""[n] values of this rank's loss tokens -> [N] of all that the row has, with gradient."""


class Loss(Protocol):
    """The loss of packed rows."""

    @property
    def num_sums(self) -> int: ...

    def __call__(
        self, head: Head, batch: MicroBatch, own: LossTokens, whole: Whole
    ) -> MeasuredLoss:
        """The loss of a row, of which this rank predicts the tokens own [n]; head is at these."""
        ...

    def metrics(self, sums: Tensor, extrema: Tensor) -> dict[str, float]:
        """Named metrics of the sums [num_sums] and extrema [len(EXTREMA)] of all micro-batches."""
        ...


def loss_of(objective: Objective, shared: SharedTerms) -> Loss:
    """The loss of an objective; the shared terms are about tokens, so pairs have none."""
    if isinstance(objective, Dpo):
        return PairLoss(objective)
    assert isinstance(objective, TokenObjective)
    return TokenLoss(objective, shared)


@dataclass(frozen=True)
class TokenLoss:
    """The loss of an objective that sums over tokens."""

    objective: TokenObjective
    shared: SharedTerms = field(default_factory=SharedTerms)
    num_sums = len(SUMS)

    def __call__(
        self, head: Head, batch: MicroBatch, own: LossTokens, whole: Whole
    ) -> MeasuredLoss:
        is_of_response = self.objective.ratio_of == "response" or self.shared.needs_responses
        if batch.part is None or not is_of_response:
            responses = batch.response_lengths if is_of_response else None
            return linear_policy_loss(head, own, self.objective, self.shared, responses=responses)
        # A response lies on several ranks, so each computes the loss of the whole row.
        logprobs, entropy = linear_logprobs(head, own.targets)
        result = token_loss(
            whole(logprobs, batch),
            whole(entropy, batch),
            batch.loss,
            self.objective,
            self.shared,
            batch.response_lengths,
        )
        return result._replace(is_of_parts=False)

    def metrics(self, sums: Tensor, extrema: Tensor) -> dict[str, float]:
        return metrics_from(sums, extrema)


@dataclass(frozen=True)
class PairLoss:
    """The loss of direct preference optimization.

    Both responses of a pair are in one row (batching/), so one forward and one backward suffice.
    """

    objective: Dpo
    num_sums = len(SUMS) + len(PAIR_SUMS)

    def __call__(
        self, head: Head, batch: MicroBatch, own: LossTokens, whole: Whole
    ) -> MeasuredLoss:
        logprobs, entropy = (whole(x, batch) for x in linear_logprobs(head, own.targets))
        pair_of = batch.group_of.repeat_interleave(
            batch.response_lengths, output_size=len(batch.loss.at)
        )
        loss, pair_sums = self.objective.pair_loss(logprobs, batch.loss, pair_of, batch.num_groups)
        with torch.no_grad():  # what is measured of tokens is the same under any objective
            tokens = token_loss(logprobs, entropy, batch.loss, Likelihood(), SharedTerms())
            tokens.sums[SUMS.index("loss")] = loss.double()
        return MeasuredLoss(
            loss=loss,
            logprobs=logprobs.detach(),
            sums=torch.cat([tokens.sums, pair_sums]),
            extrema=tokens.extrema,
            is_of_parts=False,
        )

    def metrics(self, sums: Tensor, extrema: Tensor) -> dict[str, float]:
        return metrics_from(sums[: len(SUMS)], extrema) | pair_metrics(sums[len(SUMS) :])


def no_extrema(device: torch.device) -> Tensor:
    """[len(EXTREMA)] zeros, from which maxima start."""
    return torch.zeros(len(EXTREMA), dtype=torch.float64, device=device)
