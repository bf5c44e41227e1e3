"""The policy: log-probabilities and updates over packed micro-batches, at any layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.gradients import MainGrad
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.objectives.loss import Loss, no_extrema
from megatron_rl.ops.head import Head, most_rows
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.products import product
from megatron_rl.ops.sample import sample_from_head
from megatron_rl.ops.truncated import Truncation, sample_truncated
from megatron_rl.ops.vocab_parallel import Shard, row_slices
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import LossTokens, MicroBatch
from megatron_rl.weights.arch import ModelArch, padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """Results of one optimizer step."""

    metrics: dict[str, float]  # equal on all ranks
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
        """temperature: that of sampling, by which all logits are divided."""
        super().__init__(arch, model, parallel, optimizer, groups, run_updates=run_updates)
        self.temperature = temperature

    def logprobs(self, microbatches: Sequence[MicroBatch]) -> list[Tensor] | None:
        """Log-probabilities [N] of the loss tokens of each micro-batch; None off the last stage.

        Every rank calls it, with its own data-parallel rank's micro-batches.
        """
        scored = self._score(microbatches)
        return None if scored is None else [logprobs for logprobs, _ in scored]

    def entropies(self, microbatches: Sequence[MicroBatch]) -> list[Tensor] | None:
        """Entropies [N] over the whole vocabulary, in nats, where the loss tokens were chosen.

        Every rank calls it, with its own data-parallel rank's micro-batches. None off the last
        stage.
        """
        scored = self._score(microbatches)
        return None if scored is None else [entropies for _, entropies in scored]

    def _score(self, microbatches: Sequence[MicroBatch]) -> list[tuple[Tensor, Tensor]] | None:
        """(log-probabilities, entropies) [N] of each micro-batch; None off the last stage."""
        collected: list[tuple[Tensor, Tensor]] = []

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            own = batch.own_loss
            logprobs, entropies = linear_logprobs(self._head(hidden, own), own.targets)
            collected.append((self.whole(logprobs, batch), self.whole(entropies, batch)))
            return logprobs.sum()  # the schedule asks for a loss

        self.forward(microbatches, measure)
        return collected if self.groups.is_last_stage else None

    def sample(
        self,
        hidden: Tensor,
        repeats: Tensor | None,
        seeds: Tensor,
        places: Tensor,
        temperatures: Tensor,
        truncation: Truncation | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(tokens [n] int64, log-probs [n], support [n, K] as in Truncated) drawn behind final
        hidden states; last stage only.

        Args:
            hidden: [m, H].
            repeats: [n] int64, ascending: the hidden state of each token; None: one each.
            seeds: [n] int64 of the requests.
            places: [n] int64 of the tokens in their responses.
            temperatures: [n] float64; 0 is greedy.
            truncation: None: tokens are drawn from the whole vocabulary, and there is no support.
        """
        weight, shard, device = self.head_weight, self._shard(), hidden.device
        found: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for rows in row_slices(len(seeds), most_rows(hidden, weight)):
            states, of_rows = hidden[rows], None
            if repeats is not None:
                first, last = int(repeats[rows][0]), int(repeats[rows][-1])
                states = hidden[first : last + 1]
                of_rows = (repeats[rows] - first).to(device)
            own = [x[rows].to(device) for x in (seeds, places, temperatures)]
            if truncation is None:
                drawn = sample_from_head(states, weight, shard, *own, of_rows=of_rows)
                found.append((*drawn, None))
            else:
                logits = product(states, weight.T)
                logits = logits if of_rows is None else logits.index_select(0, of_rows)
                found.append(sample_truncated(logits, shard, *own, truncation=truncation))
        tokens, logprobs, supports = zip(*found, strict=True)
        support = None if truncation is None else torch.cat(supports)
        return torch.cat(tokens), torch.cat(logprobs), support

    def update(self, microbatches: Sequence[MicroBatch], loss: Loss) -> UpdateResult:
        """One optimizer step on a mini-batch whose weights are shares of the global loss."""
        device = self.groups.platform.current_device()
        sums = torch.zeros(loss.num_sums, dtype=torch.float64, device=device)
        extrema = no_extrema(device)
        collected: list[Tensor] = []
        scale = self.loss_scale()

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            own = batch.own_loss
            result = loss(self._trained_head(hidden, own, scale), batch, own, self.whole)
            if result.is_of_parts or self.groups.here.cp_rank == 0:
                sums.add_(result.sums)
            torch.maximum(extrema, result.extrema, out=extrema)
            collected.append(
                self.whole(result.logprobs, batch) if result.is_of_parts else result.logprobs
            )
            return result.loss

        self.backward(microbatches, measure)
        # The host waits for the device here, and not once for each micro-batch.
        sums, extrema = torch.cat([sums, extrema]).cpu().split([len(sums), len(extrema)])
        metrics = loss.metrics(self.summed_parts(sums), self.largest(extrema))
        metrics |= self.routers.metrics(self.name)
        metrics |= self.step(metrics["policy/loss"])
        return UpdateResult(
            metrics=metrics, logprobs=collected if self.groups.is_last_stage else None
        )

    def _head(self, hidden: Tensor, own: LossTokens) -> Head:
        rows = self.head_input(hidden, own.at)
        return Head(
            hidden=rows, head_weight=self.head_weight, shard=self._shard(), support=own.support
        )

    def _trained_head(self, hidden: Tensor, own: LossTokens, loss_scale: float) -> Head:
        head, buffer = self._head(hidden, own), MainGrad(self.head_weight)
        return replace(head, gradient_buffer=buffer, loss_scale=loss_scale)

    def _shard(self) -> Shard:
        tp = self.groups.layout.tp
        columns = padded_vocab_size(self.arch.vocab_size, tp) // tp
        return Shard(
            tp_group=self.groups.tensor_parallel,
            vocab_start=self.groups.here.tp_rank * columns,
            valid_vocab=self.arch.vocab_size,
            temperature=self.temperature,
        )
