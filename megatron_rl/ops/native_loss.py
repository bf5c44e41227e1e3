"""The loss of tokens by the compiled ops: LM head and loss in one, the gradient in the forward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.head import Head, logits_memory
from megatron_rl.ops.head_gradient import GradientBuffer, HeadGradient
from megatron_rl.ops.loss_spec import (
    KL_ESTIMATORS,
    LOSS_KINDS,
    MeasuredLoss,
    NativeTerm,
    SharedTerms,
)
from megatron_rl.ops.products import product
from megatron_rl.ops.support import keep_support
from megatron_rl.ops.vocab_parallel import Shard, compute_dtype, gather_stats, row_slices
from megatron_rl.types import LossTokens


def native_policy_loss(
    head: Head,
    tokens: LossTokens,
    term: NativeTerm,
    shared: SharedTerms,
    *,
    chunk_rows: int | None = None,
) -> MeasuredLoss:
    """The loss of N tokens; arguments and gradients as in linear_logprobs."""
    results = _LinearPolicyLoss.apply(
        head.hidden,
        head.head_weight,
        tokens,
        head.support,
        (term, shared),
        head.shard,
        head.chunk_size(tokens.targets, chunk_rows),
        head.gradient_buffer,
        head.loss_scale,
        torch.is_grad_enabled(),
    )
    return MeasuredLoss(*results)


def loss_arguments(
    tokens: LossTokens, term: NativeTerm, shared: SharedTerms
) -> tuple[Tensor | float | bool | None, ...]:
    """The arguments of token_loss and policy_loss_onepass_ about the loss, in their order."""
    correction = shared.correction
    return (
        tokens.old_logprobs,
        tokens.ref_logprobs,
        tokens.rollout_logprobs,
        tokens.advantages,
        tokens.weights,
        LOSS_KINDS.index(term.kind),
        term.low,
        term.high,
        term.dual_clip,
        shared.kl_coef,
        KL_ESTIMATORS.index(shared.kl_estimator),
        shared.entropy_coef,
        0.0 if correction is None else correction.low,
        None if correction is None else correction.high,
        correction is not None and correction.mode == "mask",
        True,  # the entropy is measured whether or not the loss uses it
    )


class _Scale(NamedTuple):
    """The gradient of the loss, for the host and on the device."""

    number: float
    tensor: Tensor  # [], in the compute dtype


class _LinearPolicyLoss(torch.autograd.Function):
    """LM head and loss in row chunks: three products, the gradient written in the forward.

    A chunk's logits become their own gradient before the next chunk's are computed, since the
    loss of a token needs nothing of other tokens. The backward only scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        tokens: LossTokens,
        support: Tensor | None,
        terms: tuple[NativeTerm, SharedTerms],
        shard: Shard,
        chunk_size: int,
        buffer: GradientBuffer | None,
        loss_scale: float,
        has_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (has_grad and wants for wants in ctx.needs_input_grad[:2])
        wants = wants_hidden or wants_weight
        dtype = compute_dtype(hidden.dtype)
        scale = _Scale(loss_scale, hidden.new_full((), loss_scale, dtype=dtype))
        tokens = tokens.constants(dtype)
        chunks = row_slices(len(hidden), chunk_size)
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = (
            HeadGradient(head_weight, num_chunks=len(chunks), buffer=buffer, loss_scale=loss_scale)
            if wants_weight
            else None
        )
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        chunks = chunks or [slice(0, 0)]  # zero rows have their sums too
        parts = []
        with logits_memory(chunk_size, len(head_weight), hidden) as memory:
            for rows in chunks:
                logits = product(hidden[rows], head_weight.T, memory[: rows.stop - rows.start])
                keep_support(logits, None if support is None else support[rows], shard)
                logprobs[rows], sums, extrema = _turn_into_gradient(
                    logits, tokens[rows], terms, shard, scale if wants else None
                )
                parts.append((sums, extrema))
                if hidden_grad is not None:
                    own = hidden_grad[rows]
                    if (part := product(logits, head_weight, own)) is not own:
                        own.copy_(part)
                if head_grad is not None:
                    head_grad.add(logits, hidden[rows])
        sums = torch.stack([part[0] for part in parts]).sum(0)
        extrema = torch.stack([part[1] for part in parts]).amax(0)
        ctx.hidden_grad, ctx.head_grad, ctx.is_spent = hidden_grad, head_grad, False
        ctx.loss_scale = loss_scale
        ctx.mark_non_differentiable(logprobs, sums, extrema)
        return sums[-1].to(dtype), logprobs, sums, extrema  # SUMS ends with the loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *rest: None) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError(
                "linear_policy_loss: its gradients were handed out by the first backward; compute "
                "the loss again"
            )
        hidden_grad, head_grad = ctx.hidden_grad, ctx.head_grad
        ctx.hidden_grad, ctx.head_grad, ctx.is_spent = None, None, True
        weight_grad = None
        if hidden_grad is not None:
            torch.ops.megatron_rl.rescale_if_(hidden_grad, grad.contiguous(), ctx.loss_scale)
        if head_grad is not None:
            head_grad.rescale(grad)
            weight_grad = head_grad.hand_over()
        return hidden_grad, weight_grad, *[None] * 8


def _turn_into_gradient(
    logits: Tensor,
    tokens: LossTokens,
    terms: tuple[NativeTerm, SharedTerms],
    shard: Shard,
    scale: "_Scale | None",
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, sums, extrema) of a chunk; logits turn into their gradient, if scale is given."""
    arguments, inv_temp = loss_arguments(tokens, *terms), 1.0 / shard.temperature
    if scale is not None and shard.is_whole:
        logprobs, _, _, sums, extrema = torch.ops.megatron_rl.policy_loss_onepass_(
            logits, tokens.targets, *arguments, shard.valid_vocab, inv_temp, scale.number
        )
        return logprobs, sums, extrema
    columns = (shard.vocab_start, shard.valid_vocab, inv_temp)
    stats = torch.ops.megatron_rl.row_stats(logits, tokens.targets, tokens.weights, *columns, True)
    logprobs, _, params, _, sums, extrema = torch.ops.megatron_rl.token_loss(
        gather_stats(stats, shard.tp_group), *arguments, inv_temp
    )
    if scale is not None:
        torch.ops.megatron_rl.dlogits_(logits, tokens.targets, params, scale.tensor, *columns)
    return logprobs, sums, extrema
