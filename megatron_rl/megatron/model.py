"""A Megatron-Core model of this rank: weights, schedule, gradients and optimizer steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor

from megatron_rl.errors import InputError, NonFiniteError
from megatron_rl.megatron.auxiliary import auxiliary_losses
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.decoding import Decoder
from megatron_rl.megatron.gathering import repeated
from megatron_rl.megatron.in_use import layers_in_use, optimizer_in_use, precision_in_use
from megatron_rl.megatron.kv_cache import KeyValueCache
from megatron_rl.megatron.network import (
    HiddenStatesModel,
    ValueModel,
    build_chunks,
    in_training_precision,
)
from megatron_rl.megatron.optimizer import (
    LEAST_LOSS_SCALE,
    build_optimizer,
    build_scheduler,
)
from megatron_rl.megatron.residence import Residence
from megatron_rl.megatron.rope import Rope
from megatron_rl.megatron.routers import Routers, biases_of_routers
from megatron_rl.megatron.schedule import Measure, finalize_without_dividing, run_schedule
from megatron_rl.megatron.stored_files import open_weights
from megatron_rl.megatron.stored_names import local_name
from megatron_rl.megatron.transformer_config import DTYPES, transformer_config
from megatron_rl.parallel.collectives import all_gather_objects, max_over
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.context import whole
from megatron_rl.parallel.groups import Groups
from megatron_rl.platforms.host_bytes import host_copies
from megatron_rl.types import MicroBatch
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.finite import first_not_finite
from megatron_rl.weights.hf_files import WeightFiles
from megatron_rl.weights.layouts import VOCABULARY, check_filled, megatron_pieces
from megatron_rl.weights.model_source import ModelSource
from megatron_rl.weights.pieces import Piece


class TrainedModel:
    """A model that is trained: the common part of policy and critic."""

    name: str
    """Its name in metrics, messages and checkpoints."""

    has_value_head = False
    """True where a value head stands in the place of the LM head."""

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
        self.config.finalize_model_grads_func = finalize_without_dividing
        attention = model.attention(device_type, arch.head_dim)
        use_te = attention == "transformer_engine"
        self.in_use = [layers_in_use(model.megatron, attention)]
        self.chunks: list[Any] = build_chunks(
            arch,
            self.config,
            groups,
            attention=attention,
            chunk_class=ValueModel if self.has_value_head else HiddenStatesModel,
        )
        self.routers = Routers(self.chunks, auxiliary_losses(model.megatron), arch, groups)
        device = groups.platform.current_device()
        self._rope = None if use_te else Rope(arch, self.dtype, device)
        self._in_blocks = attention == "blocks"
        self._overlaps_reduction = parallel.overlaps_reduction(device_type)
        self.pieces: list[Piece] = self._pieces()
        self.version = 0  # optimizer steps taken
        self._optimizer_config = optimizer
        self.run_updates = run_updates
        self._trainable: list[Any] = []
        self.residence = Residence(self.chunks, groups.platform.current_device().type)
        self._chunk_settings: dict[str, object] = {}

    def _pieces(self) -> list[Piece]:
        """The rectangles of Hugging Face tensors that this rank's parameters hold."""
        return megatron_pieces(self.arch, self.groups.layout, self.groups.here)

    # -- weights ---------------------------------------------------------------------------------

    def named_parameters(self) -> dict[str, Tensor]:
        """This rank's parameters, and biases of routers, under the names of weights/layouts."""
        self.residence.bring_weights()
        vpp = self.groups.layout.vpp
        return {
            (f"chunk{chunk}." if vpp > 1 else "") + local_name(name): tensor.data
            for chunk, module in enumerate(self.chunks)
            for name, tensor in chain(module.named_parameters(), biases_of_routers(module))
        }

    @torch.no_grad()
    def load(self, source: ModelSource) -> None:
        """Read this rank's rectangles of the checkpoint; rows of padding become zero.

        Every rank calls it.

        Raises:
            InputError: a weight of any rank is not finite.
        """
        params = self.named_parameters()
        check_filled({name: tuple(param.shape) for name, param in params.items()}, self.pieces)
        for name, param in params.items():
            if name.endswith(VOCABULARY):
                param.zero_()
        self._weights(source).fill(params, self.pieces)
        told = all_gather_objects(first_not_finite(params, self.pieces), self.groups.world)
        if found := next((problem for problem in told if problem is not None), None):
            raise InputError(
                f"{source.megatron_dir or source.config_dir}: {found} in {self.dtype}, and so "
                "would be all that the model computes. The weights are damaged, or too large for "
                "model.dtype"
            )

    def _weights(self, source: ModelSource) -> WeightFiles:
        """The files with the first weights."""
        return open_weights(source, self.arch)

    def prepare_training(self) -> None:
        """Wrap the loaded model in DDP and build the optimizer (whose main weights copy it)."""
        config = self._optimizer_config
        # See faults.py, distributed_optimizer_in_float64.
        is_sharded = config.use_distributed_optimizer and self.dtype != torch.float64
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=self.dtype != torch.float64,
            use_distributed_optimizer=is_sharded,
            overlap_grad_reduce=self._overlaps_reduction,
        )
        modules = in_training_precision(self.config, self.chunks)
        self._trainable = [
            DistributedDataParallel(self.config, ddp_config, module) for module in modules
        ]
        if self._overlaps_reduction:
            # Only the last micro-batch's backward may start to reduce.
            no_sync = [module.no_sync for module in self._trainable]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if self.config.bf16 or self.config.fp16:
            self._chunk_settings = {"fp32_output": False}  # hidden states stay in 16 bits
        self.optimizer = build_optimizer(config, self._trainable, self.dtype, is_sharded=is_sharded)
        if self.config.fp16:
            self.config.grad_scale_func = self.optimizer.scale_loss
        gradients = self._trainable[0].buffers[0].grad_data
        self.in_use += [
            precision_in_use(self.dtype, gradients.dtype, self.loss_scale()),
            optimizer_in_use(
                self.optimizer.chained_optimizers[0].optimizer,
                shards=self.groups.layout.copies if is_sharded else 1,
                overlaps=self._overlaps_reduction,
            ),
        ]
        self.scheduler = build_scheduler(config, self.optimizer, self.run_updates)
        self.residence.trains(self._trainable, self.optimizer)

    @contextmanager
    def weights_replaced(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with other weights of the same names, maybe from host memory; then restore ours."""
        params = self.named_parameters()
        own = host_copies(params, self.groups.platform.current_device().type)
        try:
            for name, param in params.items():
                param.copy_(weights[name])
            yield
        finally:
            for name, param in params.items():
                param.copy_(own[name])

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of this rank's weights in host memory, pinned beside a GPU."""
        return host_copies(self.named_parameters(), self.groups.platform.current_device().type)

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs besides weights and optimizer, as JSON."""
        return {"version": self.version, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.num_steps = 0  # loading adds the checkpoint's steps to these
        self.scheduler.load_state_dict(state["scheduler"])
        self.version = state["version"]

    # -- the head, which is applied outside ------------------------------------------------------

    @property
    def head_weight(self) -> Tensor:
        """[V/tp, H] rows of the LM head on this rank, or [1, H] value head; last stage only."""
        self.residence.bring_weights()
        weight: Tensor = self.chunks[-1].head_weight()
        return weight

    def head_input(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[n, H] final hidden states at entries [n] of this rank, whole on its tp ranks."""
        whole: Tensor = self.chunks[-1].head_input(hidden)
        return repeated(whole[:, 0], rows)

    # -- sampling --------------------------------------------------------------------------------

    def decoder(self) -> Decoder:
        """The chunks of this rank as they sample; local layers only."""
        assert self._rope is not None
        return Decoder(
            self.chunks,
            self._rope,
            self.groups,
            in_blocks=self._in_blocks,
            dtype=self.dtype,
            hidden_size=self.arch.hidden_size,
            is_split=self.config.sequence_parallel,
        )

    def key_value_cache(self, num_slots: int, num_tokens: int) -> KeyValueCache:
        """Room for so many sequences of so many tokens, in every layer of this rank."""
        return KeyValueCache(num_slots, num_tokens)

    # -- passes ----------------------------------------------------------------------------------

    def forward(self, microbatches: Sequence[MicroBatch], measure: Measure) -> None:
        """Run the rows without gradients; every rank calls it, with its own rows."""
        with torch.no_grad():
            self._run(microbatches, measure, forward_only=True)

    def backward(self, microbatches: Sequence[MicroBatch], measure: Measure) -> None:
        """Gradients of the mini-batch, reduced over data-parallel ranks, in main_grad."""
        if self.routers.needs_counts:
            with self.routers.counting():
                self.forward(microbatches, lambda hidden, _: hidden.sum())
        self.residence.bring_gradients()
        for module in self._trainable:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.routers.training(microbatches):
            self._run(microbatches, measure, forward_only=False)

    def loss_scale(self) -> float:
        """What the backward begins with: 1, but in float16. The host waits for the device."""
        return self.optimizer.get_loss_scale().item() if self.config.fp16 else 1.0

    def step(self, loss: float) -> dict[str, float]:
        """Take the optimizer step on the gradients of this loss; metrics, equal on all ranks.

        Where the loss or the gradient is not finite and the recipe says to skip, nothing changes.
        Nor does it where a gradient overflows in float16, but for the loss scale.

        Raises:
            NonFiniteError: they are not finite, and the recipe says to stop.
        """
        skips = self._optimizer_config.on_nonfinite == "skip"
        scale = self.loss_scale()
        is_scaled = scale > LEAST_LOSS_SCALE  # else an overflow is not the scale's
        if skips and not (math.isfinite(loss) and (is_scaled or self._gradient_is_finite())):
            return {f"{self.name}/nonfinite_updates": 1.0}
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{self.name} version {self.version}: the loss is {loss}. The update was not made; "
                "lower its learning rate, or look for non-finite rewards or log-probs"
            )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.residence.bring_state()  # so late, when no activation is left
        succeeded, grad_norm, _ = self.optimizer.step()
        if is_scaled and not succeeded:
            return {f"{self.name}/scaler_skipped": 1.0, f"{self.name}/loss_scale": scale}
        norm = float(grad_norm or 0.0)
        if not succeeded or not math.isfinite(norm):
            raise NonFiniteError(
                f"{self.name} version {self.version}: the gradient norm is {grad_norm}. The "
                "weights of this run can no longer be trusted; resume from the last checkpoint"
            )
        self.routers.move_biases()
        self.scheduler.step(increment=1)
        self.version += 1
        counted = {f"{self.name}/nonfinite_updates": 0.0} if skips else {}
        if self.config.fp16:
            counted |= {f"{self.name}/scaler_skipped": 0.0, f"{self.name}/loss_scale": scale}
        return {f"{self.name}/grad_norm": norm, f"{self.name}/lr": learning_rate, **counted}

    def _gradient_is_finite(self) -> bool:
        """Whether it is on all ranks: what is not is found before the optimizer has used it."""
        looks = [
            buffer.grad_data.isfinite().all()
            for chunk in self._trainable
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        is_good = bool(torch.stack(looks).all())  # the host waits for the device once
        return not max_over([float(not is_good)], self.groups.world)[0]

    def summed(self, sums: Tensor) -> Tensor:
        """[n] float64 sums over data-parallel replicas, in place; one rank of each counts."""
        return self._reduced(sums, dist.ReduceOp.SUM, counts=self.groups.is_first_copy)

    def summed_parts(self, sums: Tensor) -> Tensor:
        """The same of sums over a rank's own tokens: each context-parallel part counts."""
        return self._reduced(sums, dist.ReduceOp.SUM, counts=self.groups.is_first_of_part)

    def largest(self, values: Tensor) -> Tensor:
        """[n] maxima over all parts, in place; values are never negative."""
        return self._reduced(values, dist.ReduceOp.MAX, counts=self.groups.is_first_of_part)

    def _reduced(self, values: Tensor, op: Any, *, counts: bool) -> Tensor:
        if not counts:
            values.zero_()
        dist.all_reduce(values, op=op, group=self.groups.world)
        return values

    def whole(self, values: Tensor, batch: MicroBatch) -> Tensor:
        """[N] values of the row's loss tokens, on every rank that has a part of the row.

        values: [n] of this rank's.
        """
        group = self.groups.context_parallel
        if group is None or batch.part is None:
            return values
        return whole(values, batch.part.loss, len(batch.loss.at), group)

    def _run(
        self, microbatches: Sequence[MicroBatch], measure: Measure, *, forward_only: bool
    ) -> None:
        self.residence.bring_weights()
        run_schedule(
            self._trainable or self.chunks,
            microbatches,
            measure,
            forward_only=forward_only,
            routers=self.routers,
            rope=self._rope,
            in_blocks=self._in_blocks,
            settings=self._chunk_settings,
        )
