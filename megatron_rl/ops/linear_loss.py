"""LM head and loss in row chunks, so that only one chunk's logits are ever alive.

The definition's backward computes a chunk's logits again. Since the log-sum-exps are kept ([N]
numbers), it needs no collective, and the weight's gradient is summed over chunks before it is
rounded. The native loss writes the gradient in the forward instead (ops/native_loss.py).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops import backend
from megatron_rl.ops.head_gradient import HeadGradient, main_grad_of
from megatron_rl.ops.native_loss import LinearPolicyLossFunction, LossInputs, Shard
from megatron_rl.ops.token_loss import LossSpec, TokenLoss, check_inputs, token_loss
from megatron_rl.ops.vocab_parallel import (
    compute_dtype,
    gather_stats,
    merge_stats,
    row_slices,
    shard_columns,
    shard_gradient,
    shard_stats,
)

LOGITS_BYTES = 1_250_000_000
"""What the logits of a chunk may take. Every chunk reads and writes the whole gradient of the head,
so few are better. Of 151,936 columns of 16 bits these are 4,113 rows."""


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    valid_vocab: int,
    temperature: float,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    spec: LossSpec,
    with_entropy: bool,
    chunk_rows: int | None = None,
    into_main_grad: bool = False,
) -> tuple[TokenLoss, Tensor]:
    """Loss of N rows that carry loss, and their log-probabilities, detached; 0 at weight 0.

    The loss is equal on all tp ranks. The gradient of hidden is this rank's partial sum over its
    columns, which the caller's mapping adds up over tp_group. Zero rows give a loss of 0 that
    is connected to hidden and weight, with gradients of 0.

    Args:
        hidden: [N, H], equal on all tp ranks, in the dtype of weight.
        weight: [V/tp, H], this rank's rows of the LM head.
        targets: [N] global token ids.
        tp_group, vocab_start, valid_vocab, temperature: as in vocab_parallel_logprobs.
        old_logprobs, ref_logprobs, rollout_logprobs, advantages, weights, spec: as in token_loss.
        with_entropy: measure the entropy even if spec.entropy_coef is 0.
        chunk_rows: most rows of logits alive at a time; changes results by rounding only. None: as
            many as fit into LOGITS_BYTES.
        into_main_grad: add the gradient of weight to weight.main_grad, as Megatron's fused gradient
            accumulation does, rather than make a tensor of it for autograd; in all losses of a step
            or in none. Then the loss must be backpropagated exactly once and as it is: native
            ops add the gradient in the forward, and if the loss gets another gradient than 1 they
            make main_grad NaN.
    """
    size = _chunk_size(hidden, weight, targets, chunk_rows)
    if into_main_grad:
        main_grad_of(weight)  # or raise before any work
    if backend.is_native("policy_loss_onepass_", hidden) and hidden.dtype == weight.dtype:
        inputs = LossInputs(
            old_logprobs, ref_logprobs, rollout_logprobs, advantages, weights, spec, with_entropy
        )
        shard = Shard(tp_group, vocab_start, valid_vocab, 1.0 / temperature)
        return _native_loss(hidden, weight, targets, inputs, shard, size, into_main_grad)
    logprobs, entropy = differentiable_linear_logprobs(
        hidden,
        weight,
        targets,
        tp_group=tp_group,
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        temperature=temperature,
        chunk_rows=chunk_rows,
        into_main_grad=into_main_grad,
    )
    result = token_loss(
        logprobs,
        entropy if with_entropy or spec.entropy_coef != 0 else None,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        weights=weights,
        spec=spec,
    )
    return result, logprobs.detach().where(weights != 0, 0.0)


def _native_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inputs: LossInputs,
    shard: Shard,
    chunk_size: int,
    into_main_grad: bool,
) -> tuple[TokenLoss, Tensor]:
    spec = inputs.spec
    entropy_if_any = hidden if inputs.with_entropy or spec.entropy_coef != 0 else None
    check_inputs(
        spec, entropy=entropy_if_any, ref=inputs.ref_logprobs, rollout=inputs.rollout_logprobs
    )
    loss, logprobs, sums, extrema = LinearPolicyLossFunction.apply(
        hidden,
        weight,
        targets.contiguous(),
        inputs,
        shard,
        chunk_size,
        into_main_grad,
        torch.is_grad_enabled(),
    )
    return TokenLoss(loss=loss, sums=sums, extrema=extrema), logprobs


def differentiable_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    valid_vocab: int,
    temperature: float,
    chunk_rows: int | None = None,
    into_main_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [N] of hidden @ weight.T, for any loss written in torch.

    Arguments, gradients and memory as in linear_policy_loss, but that a loss of them may get any
    gradient, into_main_grad or not. Collectives: one, in the forward.
    """
    size = _chunk_size(hidden, weight, targets, chunk_rows)
    if into_main_grad:
        main_grad_of(weight)  # or raise before any work
    num_valid = shard_columns(len(weight), vocab_start, valid_vocab)
    logprobs, entropy = _LinearLogprobs.apply(
        hidden,
        weight,
        targets,
        tp_group,
        num_valid,
        vocab_start,
        temperature,
        size,
        into_main_grad,
    )
    return logprobs, entropy


@torch.no_grad()
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    valid_vocab: int,
    temperature: float,
    chunk_rows: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [N] and entropies [N] or None, without gradient.

    Bit-equal to those of linear_policy_loss at the same chunk_rows. Arguments as there.
    """
    logprobs, entropy = differentiable_linear_logprobs(
        hidden,
        weight,
        targets,
        tp_group=tp_group,
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        temperature=temperature,
        chunk_rows=chunk_rows,
    )
    return logprobs, entropy if with_entropy else None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tp_group: dist.ProcessGroup | None,
        num_valid: int,
        vocab_start: int,
        temperature: float,
        chunk_size: int,
        into_main_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.shard = {
            "num_valid": num_valid,
            "vocab_start": vocab_start,
            "temperature": temperature,
        }
        ctx.chunk_size, ctx.into_main_grad = chunk_size, into_main_grad
        ctx.set_materialize_grads(False)  # an entropy that is only a metric costs no backward
        stats = hidden.new_empty(len(hidden), 4, dtype=compute_dtype(hidden.dtype))
        for rows in row_slices(len(hidden), chunk_size):
            stats[rows] = shard_stats(hidden[rows] @ weight.T, targets[rows], **ctx.shard)
        logprobs, entropy, log_sum_exp = merge_stats(gather_stats(stats, tp_group))
        ctx.save_for_backward(hidden, weight, targets, log_sum_exp, entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprobs_grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sum_exp, entropy = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        chunks = row_slices(len(hidden), ctx.chunk_size)
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = (
            HeadGradient(weight, num_chunks=len(chunks), into_main_grad=ctx.into_main_grad)
            if wants_weight
            else None
        )
        for rows in chunks:
            logits_grad = shard_gradient(
                hidden[rows] @ weight.T,
                targets[rows],
                log_sum_exp[rows],
                entropy[rows],
                None if logprobs_grad is None else logprobs_grad[rows],
                None if entropy_grad is None else entropy_grad[rows],
                **ctx.shard,
            )
            if hidden_grad is not None:
                hidden_grad[rows] = logits_grad @ weight
            if head_grad is not None:
                head_grad.add(logits_grad, hidden[rows])
        weight_grad = None if head_grad is None else head_grad.hand_over()
        return hidden_grad, weight_grad, None, None, None, None, None, None, None


def _chunk_size(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int | None) -> int:
    """Rows of a chunk: chunks are as few as may be, and of about the same size."""
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.size(1) != weight.size(1)
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            "expected hidden [N, H], weight [V/tp, H] and targets [N], got "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}"
        )
    if chunk_rows is None:
        chunk_rows = max(1, LOGITS_BYTES // (len(weight) * hidden.element_size()))
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: must be >= 1, since a chunk holds whole rows")
    num_chunks = -(-len(hidden) // chunk_rows)
    return -(-len(hidden) // max(num_chunks, 1))
