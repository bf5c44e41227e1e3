"""A Megatron-Core model of this rank: weights, schedule, gradients and optimizer steps."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_rl.errors import RunError
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
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.hf_files import WeightFiles
from megatron_rl.weights.layouts import VOCABULARY, check_filled, megatron_pieces
from megatron_rl.weights.model_source import ModelSource
from megatron_rl.weights.names import local_name
from megatron_rl.weights.pieces import Piece

Measure = Callable[[Tensor, MicroBatch], Tensor]
"""Final hidden states of a row and the row -> its share of the loss; runs on the last stage."""


class TrainedModel:
    """What the policy and the critic have in common."""

    name: str
    """Of the model in metrics, messages and checkpoints."""

    chunk_class: type[HiddenStatesModel] = HiddenStatesModel

    def __init__(
        self,
        arch: ModelArch,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        groups: Groups,
        *,
        run_updates: int,
    ) -> None:
        """run_updates: the most optimizer steps that the run can take."""
        self.arch, self.groups = arch, groups
        self.dtype = DTYPES[model.dtype]
        device_type = groups.platform.device_type
        self.config = transformer_config(arch, model, parallel, device_type=device_type)
        self.config.finalize_model_grads_func = _finalize_without_dividing
        self.chunks: list[Any] = build_chunks(
            arch,
            self.config,
            groups,
            use_te=uses_transformer_engine(model, device_type),
            chunk_class=self.chunk_class,
        )
        self.pieces: list[Piece] = self._pieces()
        self.version = 0  # optimizer steps taken
        self._optimizer_config = optimizer
        self._run_updates = run_updates
        self._trainable: list[Any] = []
        self._run = get_forward_backward_func()

    def _pieces(self) -> list[Piece]:
        """Which rectangles of the Hugging Face tensors this rank's parameters hold."""
        return megatron_pieces(self.arch, self.groups.layout, self.groups.here)

    # -- weights ---------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, Tensor]:
        """This rank's parameters under the names of weights/layouts."""
        vpp = self.groups.layout.vpp
        return {
            (f"chunk{chunk}." if vpp > 1 else "") + local_name(name): parameter.data
            for chunk, module in enumerate(self.chunks)
            for name, parameter in module.named_parameters()
        }

    @torch.no_grad()
    def load(self, source: ModelSource) -> None:
        """Read this rank's rectangles of the checkpoint; padding rows become zero."""
        params = self.named_parameters()
        check_filled({name: tuple(param.shape) for name, param in params.items()}, self.pieces)
        for name, param in params.items():
            if name.endswith(VOCABULARY):
                param.zero_()
        self._weights(source).fill(params, self.pieces)

    def _weights(self, source: ModelSource) -> WeightFiles:
        """The files with the first weights."""
        return source.open_weights(self.arch)

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

    def forward(self, microbatches: Sequence[MicroBatch], measure: Measure) -> None:
        """Run the rows without gradients; every rank calls it, with its own rows."""
        with torch.no_grad():
            self._schedule(microbatches, measure, forward_only=True)

    def backward(self, microbatches: Sequence[MicroBatch], measure: Measure) -> None:
        """Gradients of the mini-batch, reduced over data-parallel ranks, in main_grad."""
        for module in self._trainable:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._schedule(microbatches, measure, forward_only=False)

    def step(self, loss: float) -> dict[str, float]:
        """Take the optimizer step on the gradients of this loss; equal on all ranks.

        Raises:
            RunError: the loss or the gradient is not finite.
        """
        if not math.isfinite(loss):
            raise RunError(
                f"{self.name} version {self.version}: the loss is {loss}. The update was not made; "
                "lower its learning rate, or look for non-finite rewards or log-probs"
            )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        succeeded, grad_norm, _ = self.optimizer.step()
        norm = float(grad_norm or 0.0)
        if not succeeded or not math.isfinite(norm):
            raise RunError(
                f"{self.name} version {self.version}: the gradient norm is {grad_norm}. The "
                "weights of this run can no longer be trusted; resume from the last checkpoint"
            )
        self.scheduler.step(increment=1)
        self.version += 1
        return {f"{self.name}/grad_norm": norm, f"{self.name}/lr": learning_rate}

    def summed(self, sums: Tensor) -> Tensor:
        """float64 sums over all ranks' rows; one copy of each replica counts. In place."""
        return self._reduced(sums, dist.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """Element-wise maximum, likewise."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Tensor, op: Any) -> Tensor:
        if not self.groups.is_first_copy:
            values.zero_()
        dist.all_reduce(values, op=op, group=self.groups.host)
        return values

    def _schedule(
        self, microbatches: Sequence[MicroBatch], measure: Measure, *, forward_only: bool
    ) -> None:
        """Run Megatron's own schedule."""
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


def _finalize_without_dividing(models: list[Any], num_tokens: Any = None, **rest: Any) -> None:
    """Megatron's gradient reductions, told no token count: there is nothing left to divide by."""
    finalize_model_grads(models, None, **rest)
