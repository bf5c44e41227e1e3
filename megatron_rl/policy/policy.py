"""The policy: log-probabilities and updates over packed micro-batches, at any layout."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_rl.errors import RunError
from megatron_rl.ops.linear_loss import linear_logprobs, linear_policy_loss
from megatron_rl.ops.token_loss import EXTREMA, SUMS, LossSpec, metrics_from
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.config import ModelConfig, OptimizerConfig
from megatron_rl.policy.layers import packed_rows
from megatron_rl.policy.model import (
    DTYPES,
    HiddenStatesModel,
    build_chunks,
    in_training_precision,
    transformer_config,
    uses_transformer_engine,
)
from megatron_rl.policy.optimizer import build_optimizer, build_scheduler
from megatron_rl.types import MicroBatch
from megatron_rl.weights.arch import ModelArch, padded_vocab_size
from megatron_rl.weights.hf_files import HfCheckpoint
from megatron_rl.weights.layouts import hf_shapes, megatron_pieces
from megatron_rl.weights.pieces import Piece


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """One optimizer step, equal on all ranks."""

    metrics: dict[str, float]
    logprobs: list[Tensor] | None  # [N] per micro-batch, detached; None off the last stage


class Policy:
    """Megatron-Core model, optimizer and schedule of this rank."""

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
        self.arch, self.groups, self.temperature = arch, groups, temperature
        self.dtype = DTYPES[model.dtype]
        device_type = groups.platform.device_type
        use_te = uses_transformer_engine(model, device_type)
        self.config = transformer_config(arch, model, parallel, device_type=device_type)
        self.config.finalize_model_grads_func = _finalize_without_dividing
        self.chunks: list[HiddenStatesModel] = build_chunks(
            arch, self.config, groups, use_te=use_te
        )
        self.pieces: list[Piece] = megatron_pieces(arch, groups.layout, groups.here)
        self.version = 0  # optimizer steps taken
        self._model = model
        self._optimizer_config = optimizer
        self._run_updates = run_updates
        self._trainable: list[Any] = []
        self._run = get_forward_backward_func()

    # -- weights ---------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, Tensor]:
        """This rank's parameters under the names of weights/layouts."""
        vpp = self.groups.layout.vpp
        return {
            (f"chunk{chunk}." if vpp > 1 else "") + name: parameter.data
            for chunk, module in enumerate(self.chunks)
            for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def load_hf(self, model_dir: Path) -> None:
        """Read this rank's rectangles of the checkpoint; padding rows become zero."""
        params = self.named_parameters()
        for param in params.values():
            param.zero_()
        filled = {piece.param for piece in self.pieces}
        unfilled = [name for name in params if name not in filled and "embed" not in name]
        assert not [name for name in unfilled if "output_layer" not in name], unfilled
        HfCheckpoint(model_dir, hf_shapes(self.arch)).fill(params, self.pieces)

    def prepare_training(self) -> None:
        """Wrap the loaded model in DDP and build the optimizer (whose main weights copy it)."""
        config = self._optimizer_config
        # The distributed optimizer of 0.16.1 knows no float64 parameters.
        is_sharded = config.use_distributed_optimizer and self.dtype != torch.float64
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=self.dtype != torch.float64,
            use_distributed_optimizer=is_sharded,
        )
        modules = in_training_precision(self.config, self.chunks)
        self._trainable = [
            DistributedDataParallel(self.config, ddp_config, module) for module in modules
        ]
        self.optimizer = build_optimizer(config, self._trainable, self.dtype, is_sharded=is_sharded)
        self.scheduler = build_scheduler(config, self.optimizer, self._run_updates)

    @contextmanager
    def weights_replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other weights (a reference policy kept in host memory), then restore ours."""
        params = self.named_parameters()
        own = {name: param.cpu().clone() for name, param in params.items()}
        try:
            for name, param in params.items():
                param.copy_(weights[name])
            yield
        finally:
            for name, param in params.items():
                param.copy_(own[name])

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of this rank's weights in host memory."""
        return {name: param.cpu().clone() for name, param in self.named_parameters().items()}

    # -- passes ----------------------------------------------------------------------------------

    def logprobs(self, microbatches: Sequence[MicroBatch]) -> list[Tensor] | None:
        """Log-probabilities [N] of the loss rows of each micro-batch; None off the last stage.

        Every rank calls it, with its own data-parallel rank's micro-batches.
        """
        collected: list[Tensor] = []

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            values, _ = linear_logprobs(*self._head_inputs(hidden, batch), **self._head_settings())
            collected.append(values)
            return values.sum()

        with torch.no_grad():
            self._schedule(microbatches, measure, forward_only=True)
        return collected if self.groups.is_last_stage else None

    def update(
        self, microbatches: Sequence[MicroBatch], spec: LossSpec, *, with_entropy: bool
    ) -> UpdateResult:
        """One optimizer step on a mini-batch whose weights are shares of the global loss."""
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        extrema = torch.zeros(len(EXTREMA), dtype=torch.float64)
        collected: list[Tensor] = []

        def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
            result, values = linear_policy_loss(
                *self._head_inputs(hidden, batch),
                **self._head_settings(),
                old_logprobs=_at_loss_rows(batch.old_logprobs, batch),
                ref_logprobs=_at_loss_rows(batch.ref_logprobs, batch),
                rollout_logprobs=_at_loss_rows(batch.rollout_logprobs, batch),
                advantages=batch.advantages[batch.loss_rows],
                weights=batch.weights[batch.loss_rows],
                spec=spec,
                with_entropy=with_entropy,
                into_main_grad=True,
            )
            sums.add_(result.sums.cpu())
            torch.maximum(extrema, result.extrema.cpu(), out=extrema)
            collected.append(values)
            return result.loss

        self.backward(microbatches, measure)
        metrics = self._reduced_metrics(sums, extrema)
        if not math.isfinite(metrics["policy/loss"]):
            raise RunError(
                f"policy version {self.version}: the loss is {metrics['policy/loss']}. The update "
                "was not made; lower optimizer.lr, or look for non-finite rewards or log-probs"
            )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        succeeded, grad_norm, _ = self.optimizer.step()
        if not succeeded or not math.isfinite(float(grad_norm or 0.0)):
            raise RunError(
                f"policy version {self.version}: the gradient norm is {grad_norm}. The weights of "
                "this run can no longer be trusted; resume from the last checkpoint"
            )
        self.scheduler.step(increment=1)
        self.version += 1
        metrics |= {"policy/grad_norm": float(grad_norm or 0.0), "policy/lr": learning_rate}
        return UpdateResult(
            metrics=metrics, logprobs=collected if self.groups.is_last_stage else None
        )

    def backward(self, microbatches: Sequence[MicroBatch], measure: Any) -> None:
        """Gradients of the mini-batch, reduced over data-parallel ranks, in main_grad."""
        for module in self._trainable:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._schedule(microbatches, measure, forward_only=False)

    def _schedule(
        self, microbatches: Sequence[MicroBatch], measure: Any, *, forward_only: bool
    ) -> None:
        """Run Megatron's own schedule; measure(hidden, batch) -> loss runs on the last stage."""
        models = self._trainable or list(self.chunks)
        extra = {"fp32_output": False} if self._trainable and self.config.bf16 else {}

        def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(batches)
            rows = packed_rows(batch.cu_seqlens, batch.max_seqlen)
            hidden = model(
                batch.tokens[None],
                batch.position_ids[None],
                None,
                packed_seq_params=rows,
                **extra,
            )
            return hidden, partial(loss, batch=batch)

        def loss(hidden: Tensor, *, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
            # Three elements and calculate_per_token_loss: the schedule divides by nothing. The
            # returned tensor may be changed in place.
            return measure(hidden, batch).clone(), torch.zeros((), dtype=torch.int32), {}

        iterators = [iter(microbatches) for _ in models]
        self._run(
            forward_step_func=forward_step,
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(microbatches),
            seq_length=max(len(batch.tokens) for batch in microbatches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    # -- head ------------------------------------------------------------------------------------

    def _head_inputs(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden [N, H], weight [V/tp, H], targets [N]) of the rows that carry loss."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        rows = batch.loss_rows
        return (
            hidden[:, 0].index_select(0, rows),
            self.chunks[-1].head_weight(),
            batch.targets[rows],
        )

    def _head_settings(self) -> dict[str, Any]:
        tp = self.groups.layout.tp
        shard = padded_vocab_size(self.arch.vocab_size, tp) // tp
        return {
            "tp_group": parallel_state.get_tensor_model_parallel_group() if tp > 1 else None,
            "vocab_start": self.groups.here.tp_rank * shard,
            "valid_vocab": self.arch.vocab_size,
            "temperature": self.temperature,
        }

    def _reduced_metrics(self, sums: Tensor, extrema: Tensor) -> dict[str, float]:
        """Metrics of the mini-batch over all ranks; one copy of each replica counts."""
        if not self.groups.is_first_copy:
            sums.zero_()
            extrema.zero_()
        dist.all_reduce(sums, group=self.groups.host)
        dist.all_reduce(extrema, op=dist.ReduceOp.MAX, group=self.groups.host)
        return metrics_from(sums, extrema)


def _finalize_without_dividing(models: list[Any], num_tokens: Any = None, **rest: Any) -> None:
    """Megatron's gradient reductions, told no token count: there is nothing left to divide by."""
    finalize_model_grads(models, None, **rest)


def _at_loss_rows(values: Tensor | None, batch: MicroBatch) -> Tensor | None:
    return None if values is None else values[batch.loss_rows]
