"""What an optimizer step of the policy minimises: a loss per token, or one per pair."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl.ops.linear_loss import differentiable_linear_logprobs, linear_policy_loss
from megatron_rl.ops.pair_loss import PAIR_SUMS, PairSpec, pair_loss
from megatron_rl.ops.token_loss import EXTREMA, SUMS, LossSpec, metrics_from, token_loss
from megatron_rl.types import MicroBatch

MEASURED_ONLY = LossSpec(kind="likelihood")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """The LM head at the rows of a micro-batch that carry loss."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V/tp, H]
    targets: Tensor  # [N] int64
    settings: dict[str, Any]  # what ops/linear_loss asks for besides


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowLoss:
    """The loss of one micro-batch, and what it measured on the way."""

    loss: Tensor  # [], with gradient
    logprobs: Tensor  # [N], detached
    sums: Tensor  # [num_sums] float64, to be added over micro-batches and data-parallel ranks
    extrema: Tensor  # [len(EXTREMA)] float64, largest values


class Objective(Protocol):
    """A loss over packed rows."""

    num_sums: int

    def __call__(self, head: Head, batch: MicroBatch) -> RowLoss: ...

    def metrics(self, sums: Tensor, extrema: Tensor) -> dict[str, float]:
        """Named metrics of what all micro-batches measured."""
        ...


def objective_of(spec: LossSpec | PairSpec) -> Objective:
    """The objective with these numbers."""
    return PairObjective(spec) if isinstance(spec, PairSpec) else TokenObjective(spec)


@dataclass(frozen=True)
class TokenObjective:
    """Every loss of ops/token_loss."""

    spec: LossSpec
    num_sums = len(SUMS)

    def __call__(self, head: Head, batch: MicroBatch) -> RowLoss:
        result, values = linear_policy_loss(
            head.hidden,
            head.weight,
            head.targets,
            **head.settings,
            **_constants(batch),
            spec=self.spec,
            with_entropy=True,
            into_main_grad=True,
        )
        return RowLoss(
            loss=result.loss, logprobs=values, sums=result.sums.cpu(), extrema=result.extrema.cpu()
        )

    def metrics(self, sums: Tensor, extrema: Tensor) -> dict[str, float]:
        return metrics_from(sums, extrema)


@dataclass(frozen=True)
class PairObjective:
    """Direct preference optimization; its reference is whichever log-probs a row brings along.

    Both responses of a pair are in one row (batching/), so one forward and one backward suffice.
    """

    spec: PairSpec
    num_sums = len(SUMS) + len(PAIR_SUMS)

    def __call__(self, head: Head, batch: MicroBatch) -> RowLoss:
        logprobs, entropy = differentiable_linear_logprobs(
            head.hidden, head.weight, head.targets, **head.settings, into_main_grad=True
        )
        constants = _constants(batch)
        reference = constants["ref_logprobs"]
        pair_of, num_pairs = _pairs(batch)
        result = pair_loss(
            logprobs,
            ref_logprobs=constants["old_logprobs"] if reference is None else reference,
            signs=constants["advantages"],
            weights=constants["weights"],
            pair_of=pair_of,
            num_pairs=num_pairs,
            spec=self.spec,
        )
        with torch.no_grad():
            tokens = token_loss(logprobs.detach(), entropy, **constants, spec=MEASURED_ONLY)
            tokens.sums[SUMS.index("loss")] = result.loss.double()
        return RowLoss(
            loss=result.loss,
            logprobs=logprobs.detach(),
            sums=torch.cat([tokens.sums, result.sums]).cpu(),
            extrema=tokens.extrema.cpu(),
        )

    def metrics(self, sums: Tensor, extrema: Tensor) -> dict[str, float]:
        pairs, preferred, margin = sums[len(SUMS) :].tolist()
        measured = metrics_from(sums[: len(SUMS)], extrema)
        if pairs:
            measured["policy/pairs"] = pairs
            measured["policy/pairs_preferred_frac"] = preferred / pairs
            measured["policy/pair_margin_mean"] = margin / pairs
        return measured


def no_extrema() -> Tensor:
    """Where maxima start from."""
    return torch.zeros(len(EXTREMA), dtype=torch.float64)


def _constants(batch: MicroBatch) -> dict[str, Any]:
    """What a loss knows of each row that carries loss, [N] each."""
    rows = batch.loss_rows

    def at_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return {
        "old_logprobs": at_rows(batch.old_logprobs),
        "ref_logprobs": at_rows(batch.ref_logprobs),
        "rollout_logprobs": at_rows(batch.rollout_logprobs),
        "advantages": batch.advantages[rows],
        "weights": batch.weights[rows],
    }


def _pairs(batch: MicroBatch) -> tuple[Tensor, int]:
    """([N] number of the pair of each row that carries loss, how many pairs)."""
    numbers: dict[int, int] = {}
    of_sample = [numbers.setdefault(s.group_id, len(numbers)) for s in batch.samples]
    lengths = [len(sample.response_tokens) for sample in batch.samples]
    pair_of = torch.tensor(of_sample, dtype=torch.int64).repeat_interleave(
        torch.tensor(lengths, dtype=torch.int64)
    )
    return pair_of.to(batch.loss_rows.device), len(numbers)
