"""The policy: log-probabilities and updates over packed micro-batches, at any layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.ops.linear_loss import linear_logprobs
from megatron_rl.ops.pair_loss import PairSpec
from megatron_rl.ops.token_loss import LossSpec
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.objectives import Head, no_extrema, objective_of
from megatron_rl.types import MicroBatch
from megatron_rl.weights.arch import ModelArch, padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """One optimizer step, equal on all ranks."""

    metrics: dict[str, float]
    logprobs: list[Tensor] | None  # [N] per micro-batch, detached; None off the last stage


class Policy(TrainedModel):
    """The language model that is trained."""

    name = "policy"

    def __init__(
        self,
        arch: ModelArch,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        groups: Groups,
        *,
        temperature: float,
        run_updates: int,
    ) -> None:
        """temperature: of sampling, so of every log-probability."""
        super().__init__(arch, model, parallel, optimizer, groups, run_updates=run_updates)
        self.temperature = temperature

    def logprobs(self, microbatches: Sequence[MicroBatch]) -> list[Tensor] | None:
        """Log-probabilities [N] of the loss rows of each micro-batch; None off the last stage.

        Every rank calls it, with its own data-parallel rank's micro-batches.
        """
        collected: list[Tensor] = []

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            head = self._head(hidden, batch)
            values, _ = linear_logprobs(head.hidden, head.weight, head.targets, **head.settings)
            collected.append(values)
            return values.sum()

        self.forward(microbatches, measure)
        return collected if self.groups.is_last_stage else None

    def update(self, microbatches: Sequence[MicroBatch], spec: LossSpec | PairSpec) -> UpdateResult:
        """One optimizer step on a mini-batch whose weights are shares of the global loss."""
        objective = objective_of(spec)
        sums = torch.zeros(objective.num_sums, dtype=torch.float64)
        extrema = no_extrema()
        collected: list[Tensor] = []

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            result = objective(self._head(hidden, batch), batch)
            sums.add_(result.sums)
            torch.maximum(extrema, result.extrema, out=extrema)
            collected.append(result.logprobs)
            return result.loss

        self.backward(microbatches, measure)
        metrics = objective.metrics(self.summed(sums), self.largest(extrema))
        metrics |= self.step(metrics["policy/loss"])
        return UpdateResult(
            metrics=metrics, logprobs=collected if self.groups.is_last_stage else None
        )

    def _head(self, hidden: Tensor, batch: MicroBatch) -> Head:
        return Head(
            hidden=self.head_input(hidden, batch.loss_rows),
            weight=self.head_weight,
            targets=batch.targets[batch.loss_rows],
            settings=self._head_settings(),
        )

    def _head_settings(self) -> dict[str, Any]:
        tp = self.groups.layout.tp
        shard = padded_vocab_size(self.arch.vocab_size, tp) // tp
        return {
            "tp_group": self.groups.tensor_parallel,
            "vocab_start": self.groups.here.tp_rank * shard,
            "valid_vocab": self.arch.vocab_size,
            "temperature": self.temperature,
        }
