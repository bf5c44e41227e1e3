import pytest
import torch
from torch.autograd.function import once_differentiable

from megatron_rl.objectives.token_loss import token_loss as token_loss_definition
from megatron_rl.ops import native
from megatron_rl.ops.loss_spec import MeasuredLoss
from megatron_rl.ops.native_loss import loss_arguments


class _NativeTokenLoss(torch.autograd.Function):
    """The compiled loss of log-probabilities that are given rather than computed from logits."""

    @staticmethod
    def forward(ctx, logprobs, entropy, tokens, term, shared):
        ctx.has_entropy_grad = entropy is not None and shared.entropy_coef != 0
        # The record of a row whose statistics merge to just these numbers.
        zeros = torch.zeros_like(logprobs)
        minus_entropy = zeros if entropy is None else -entropy.to(logprobs.dtype)
        stats = torch.stack([zeros, zeros + 1, minus_entropy, logprobs], dim=1)[None]
        *arguments, _ = loss_arguments(tokens.constants(logprobs.dtype), term, shared)
        _, _, params, loss, sums, extrema = torch.ops.megatron_rl.token_loss(
            stats, *arguments, entropy is not None, 1.0
        )
        ctx.save_for_backward(params)
        ctx.mark_non_differentiable(sums, extrema)
        return loss, sums, extrema

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *rest):
        (params,) = ctx.saved_tensors
        entropy_grad = grad * params[:, 2] if ctx.has_entropy_grad else None
        return grad * params[:, 1], entropy_grad, None, None, None


def native_token_loss(logprobs, entropy, tokens, objective, shared):
    if objective.native is None:
        pytest.skip(f"{objective.kind} is not compiled")
    loss, sums, extrema = _NativeTokenLoss.apply(
        logprobs, entropy, tokens, objective.native, shared
    )
    return MeasuredLoss(loss, logprobs.detach(), sums, extrema)


@pytest.fixture(params=["definition", "native"])
def token_loss(request):
    """The loss of tokens by its definition, and by the compiled op that must equal it."""
    if request.param == "definition":
        return token_loss_definition
    if not native.BUILT:
        pytest.skip(f"no native ops: {native.FAULT}")
    return native_token_loss
