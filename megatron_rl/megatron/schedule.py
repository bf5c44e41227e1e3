"""Micro-batches through Megatron-Core's own pipeline schedule."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_rl.megatron.attention import PackedRows, packed_rows
from megatron_rl.megatron.rope import Rope
from megatron_rl.megatron.routers import Routers
from megatron_rl.types import MicroBatch

Measure = Callable[[Tensor, MicroBatch], Tensor]
"""Final hidden states [T, 1, H] of this rank's tokens of a row (T/tp of them under sequence
parallelism) and the row -> its share [] of the loss; runs on the last stage."""


def run_schedule(
    models: Sequence[Any],
    microbatches: Sequence[MicroBatch],
    measure: Measure,
    *,
    forward_only: bool,
    routers: Routers,
    rope: Rope | None,
    in_blocks: bool,
    settings: Mapping[str, object],
) -> None:
    """Run the rows through the model chunks of this rank; every rank calls it, with its own rows.

    rope: of local layers. in_blocks: their attention pads sequences into blocks. settings: keyword
    arguments of the chunks, besides the row.
    """
    planned: dict[int, PackedRows] = {}  # those that a later chunk of this rank will use
    sharing = parallel_state.get_context_parallel_group()

    def plan(batch: MicroBatch, model: Any) -> PackedRows:
        rows = planned.pop(id(batch), None) or packed_rows(
            batch, rope, in_blocks=in_blocks, sharing=sharing
        )
        if model is not models[-1]:
            planned[id(batch)] = rows
        return rows

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        with routers.forward_of(batch):
            hidden = model(
                batch.tokens[None],
                batch.position_ids[None],
                None,
                packed_seq_params=plan(batch, model),
                **settings,
            )
        return hidden, partial(loss, batch=batch)

    def loss(hidden: Tensor, *, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        # With three elements and calculate_per_token_loss the schedule divides by nothing. It may
        # change the tensor in place, so it gets a copy.
        return measure(hidden, batch).clone(), torch.zeros((), dtype=torch.int32), {}

    run = get_forward_backward_func()
    iterators = [iter(microbatches) for _ in models]
    run(
        forward_step_func=forward_step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(microbatches),
        seq_length=max(batch.num_tokens for batch in microbatches),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def finalize_without_dividing(models: list[Any], num_tokens: Any = None, **rest: Any) -> None:
    """Megatron's gradient reductions, told no token count: there is nothing left to divide by."""
    finalize_model_grads(models, None, **rest)
