"""The critic: values and updates over the policy's packed micro-batches, at the same layout."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.megatron.model import TrainedModel
from megatron_rl.megatron.stored_files import open_critic_weights
from megatron_rl.objectives.value import VALUE_SUMS, value_loss, value_metrics
from megatron_rl.types import LossTokens, MicroBatch
from megatron_rl.weights.critic_files import critic_pieces, read_value_head
from megatron_rl.weights.hf_files import WeightFiles
from megatron_rl.weights.model_source import ModelSource
from megatron_rl.weights.pieces import Piece


class Critic(TrainedModel):
    """The value model: V(s_t), the return expected before token t of a response is sampled."""

    name = "critic"
    has_value_head = True

    def _pieces(self) -> list[Piece]:
        return critic_pieces(super()._pieces())

    @property
    def value_head(self) -> Tensor | None:
        """[1, H]; None off the last stage."""
        return self.head_weight if self.groups.is_last_stage else None

    def _weights(self, source: ModelSource) -> WeightFiles:
        return open_critic_weights(source, self.arch)

    @torch.no_grad()
    def load(self, source: ModelSource) -> None:
        """Read a language model (value head 0) or an exported critic."""
        super().load(source)
        saved = read_value_head(source.config_dir, self.arch)
        if self.value_head is not None and saved is not None:
            self.value_head.copy_(saved)

    def values(self, microbatches: Sequence[MicroBatch]) -> list[Tensor] | None:
        """V [N] before each response token of each micro-batch; None off the last stage."""
        collected: list[Tensor] = []

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            values = self._values(hidden, batch.own_loss)
            collected.append(self.whole(values, batch))
            return values.sum()  # the schedule asks for a loss

        self.forward([row.without_experts for row in microbatches], measure)
        return collected if self.groups.is_last_stage else None

    def update(
        self, microbatches: Sequence[MicroBatch], *, num_tokens: int, clip: float | None
    ) -> dict[str, float]:
        """One optimizer step; metrics, equal on all ranks.

        Args:
            microbatches: this rank's rows of the mini-batch, with old_values and returns on the
                last stage.
            num_tokens: response tokens of the mini-batch over all ranks, which the loss divides by.
            clip: largest move of a value away from old_values that the loss rewards.
        """
        device = self.groups.platform.current_device()
        sums = torch.zeros(len(VALUE_SUMS), dtype=torch.float64, device=device)

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            tokens = batch.own_loss
            assert tokens.old_values is not None
            assert tokens.returns is not None
            result = value_loss(
                self._values(hidden, tokens),
                old_values=tokens.old_values,
                returns=tokens.returns,
                weight=1.0 / num_tokens,
                clip=clip,
            )
            sums.add_(result.sums)
            return result.loss

        self.backward([row.without_experts for row in microbatches], measure)
        metrics = value_metrics(self.summed_parts(sums.cpu()))  # the host waits here, and only here
        metrics |= self.routers.metrics(self.name)
        return metrics | self.step(metrics["critic/loss"])

    def _values(self, hidden: Tensor, own: LossTokens) -> Tensor:
        """[n], float32 or float64; every tensor-parallel rank computes all of them."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = self.head_input(hidden, own.at)
        values: Tensor = rows.to(dtype) @ self.head_weight[0].to(dtype)
        return values
