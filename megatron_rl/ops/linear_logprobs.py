"""LM head and log-probabilities in row chunks, for any loss that is written in torch.

The backward computes a chunk's logits again. Since the log-sum-exps are kept ([N] numbers), it
needs no collective, and the weight's gradient is summed over chunks before it is rounded. The
native loss writes the gradient in the forward instead (ops/native_loss.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.head import Head, logits_memory
from megatron_rl.ops.head_gradient import GradientBuffer, HeadGradient
from megatron_rl.ops.products import product
from megatron_rl.ops.support import keep_support
from megatron_rl.ops.vocab_parallel import (
    Shard,
    compute_dtype,
    gather_stats,
    merge_stats,
    row_slices,
    shard_gradient,
    shard_stats,
)


def linear_logprobs(
    head: Head, targets: Tensor, *, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] of hidden @ head_weight.T, in nats, equal on tp ranks.

    The gradients that arrive must be equal on all tp ranks. The gradient of hidden is this rank's
    partial sum over its columns, which the caller's mapping adds up over tp ranks. Zero tokens have
    gradients of 0. Collectives: one all-gather of 4 numbers a token, in the forward.

    Args:
        head: a float64 one is computed in float64, others in float32; so are the results.
        targets: [N] int64 global token ids, equal on all ranks. One outside [0, valid_vocab), or
            outside the head's support, has log-probability -inf.
        chunk_rows: as in Head.chunk_size.
    """
    logprobs, entropy = _LinearLogprobs.apply(
        head.hidden,
        head.head_weight,
        targets,
        head.support,
        head.shard,
        head.chunk_size(targets, chunk_rows),
        head.gradient_buffer,
    )
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        support: Tensor | None,
        shard: Shard,
        chunk_size: int,
        buffer: GradientBuffer | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.shard, ctx.chunk_size, ctx.buffer = shard, chunk_size, buffer
        ctx.set_materialize_grads(False)  # an entropy that is only a metric costs no backward
        stats = hidden.new_empty(len(hidden), 4, dtype=compute_dtype(hidden.dtype))
        with logits_memory(chunk_size, len(head_weight), hidden) as memory:
            for rows in row_slices(len(hidden), chunk_size):
                logits = _logits(hidden, head_weight, support, rows, shard, memory)
                stats[rows] = shard_stats(logits, targets[rows], shard)
        logprobs, entropy, log_sum_exp = merge_stats(gather_stats(stats, shard.tp_group))
        ctx.save_for_backward(hidden, head_weight, targets, support, log_sum_exp, entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprobs_grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, head_weight, targets, support, log_sum_exp, entropy = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        chunks = row_slices(len(hidden), ctx.chunk_size)
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = (
            HeadGradient(head_weight, num_chunks=len(chunks), buffer=ctx.buffer)
            if wants_weight
            else None
        )
        with logits_memory(ctx.chunk_size, len(head_weight), hidden) as memory:
            for rows in chunks:
                logits_grad = shard_gradient(
                    _logits(hidden, head_weight, support, rows, ctx.shard, memory),
                    targets[rows],
                    log_sum_exp[rows],
                    entropy[rows],
                    None if logprobs_grad is None else logprobs_grad[rows],
                    None if entropy_grad is None else entropy_grad[rows],
                    ctx.shard,
                )
                if hidden_grad is not None:
                    hidden_grad[rows] = product(logits_grad, head_weight)
                if head_grad is not None:
                    head_grad.add(logits_grad, hidden[rows])
        weight_grad = None if head_grad is None else head_grad.hand_over()
        return hidden_grad, weight_grad, None, None, None, None, None


def _logits(
    hidden: Tensor,
    head_weight: Tensor,
    support: Tensor | None,
    rows: slice,
    shard: Shard,
    memory: Tensor,
) -> Tensor:
    logits = product(hidden[rows], head_weight.T, memory[: rows.stop - rows.start])
    return keep_support(logits, None if support is None else support[rows], shard)
