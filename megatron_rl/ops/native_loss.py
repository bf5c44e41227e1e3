"""Autograd around the native ops of csrc/. The public functions decide whether these run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.head_gradient import HeadGradient
from megatron_rl.ops.vocab_parallel import compute_dtype, gather_stats, row_slices

if TYPE_CHECKING:
    from megatron_rl.ops.token_loss import LossSpec

KINDS = {"likelihood": 0, "clipped_ratio": 1}
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2}


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """Constants of N tokens, [N] each, and what is done with them."""

    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor
    spec: "LossSpec"
    with_entropy: bool

    def to(self, dtype: torch.dtype) -> "LossInputs":
        """Detached, of this dtype, contiguous: as the ops take them."""

        def constant(values: Tensor) -> Tensor:
            return values.detach().to(dtype).contiguous()

        def optional(values: Tensor | None) -> Tensor | None:
            return None if values is None else constant(values)

        return LossInputs(
            optional(self.old_logprobs),
            optional(self.ref_logprobs),
            optional(self.rollout_logprobs),
            constant(self.advantages),
            constant(self.weights),
            self.spec,
            self.with_entropy or self.spec.entropy_coef != 0,
        )

    def at(self, rows: slice) -> "LossInputs":
        """Those of some rows."""

        def optional(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return LossInputs(
            optional(self.old_logprobs),
            optional(self.ref_logprobs),
            optional(self.rollout_logprobs),
            self.advantages[rows],
            self.weights[rows],
            self.spec,
            self.with_entropy,
        )

    def arguments(self) -> tuple[Any, ...]:
        """Of token_loss and policy_loss_onepass_, in their order."""
        spec = self.spec
        return (
            self.old_logprobs,
            self.ref_logprobs,
            self.rollout_logprobs,
            self.advantages,
            self.weights,
            KINDS[spec.kind],
            spec.eps_low,
            spec.eps_high,
            spec.dual_clip,
            spec.kl_coef,
            ESTIMATORS[spec.kl_estimator],
            spec.entropy_coef,
            spec.rollout_is_cap,
            self.with_entropy,
        )


class Shard(NamedTuple):
    """This rank's columns of the vocabulary."""

    tp_group: dist.ProcessGroup | None
    vocab_start: int
    valid_vocab: int
    inv_temp: float

    @property
    def is_whole(self) -> bool:
        """Whether no other rank has columns."""
        return self.tp_group is None or dist.get_world_size(self.tp_group) == 1


Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""loss [], logprobs [N], sums, extrema; only the loss has a gradient."""


def _mark(ctx: Any, results: Results) -> Results:
    ctx.mark_non_differentiable(*results[1:])
    return results


class TokenLossFunction(torch.autograd.Function):
    """Loss of given log-probabilities and entropies."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, inputs: LossInputs) -> Results:
        ctx.has_entropy_grad = entropy is not None and inputs.spec.entropy_coef != 0
        # The record of a row whose statistics merge to just these numbers.
        zeros = torch.zeros_like(logprobs)
        minus_entropy = zeros if entropy is None else -entropy.to(logprobs.dtype)
        stats = torch.stack([zeros, zeros + 1, minus_entropy, logprobs], dim=1)[None]
        result = torch.ops.megatron_rl.token_loss(
            stats, *inputs.to(logprobs.dtype).arguments(), 1.0
        )
        _, _, params, loss, sums, extrema = result
        ctx.save_for_backward(params)
        return _mark(ctx, (loss, logprobs.detach().clone(), sums, extrema))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *rest: None) -> tuple[Tensor, Tensor | None, None]:
        (params,) = ctx.saved_tensors
        return grad * params[:, 1], grad * params[:, 2] if ctx.has_entropy_grad else None, None


class PolicyLossFunction(torch.autograd.Function):
    """Loss of logits in memory, which the gradient may overwrite."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        inputs: LossInputs,
        shard: Shard,
        overwrite_logits: bool,
        has_grad: bool,
    ) -> Results:
        ctx.shard, ctx.overwrite_logits = shard, overwrite_logits
        inputs = inputs.to(compute_dtype(logits.dtype))
        ctx.is_done = shard.is_whole and overwrite_logits and has_grad
        if ctx.is_done:
            logprobs, _, loss, sums, extrema = torch.ops.megatron_rl.policy_loss_onepass_(
                logits, targets, *inputs.arguments(), shard.valid_vocab, shard.inv_temp, 1.0
            )
            # Whatever else saved these logits for its backward must notice, and raise.
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(logits, targets)
        else:
            logprobs, params, loss, sums, extrema = _measure(logits, targets, inputs, shard)
            ctx.save_for_backward(logits, targets, params)
        return _mark(ctx, (loss, logprobs, sums, extrema))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *rest: None) -> tuple[Tensor | None, ...]:
        if ctx.is_done:
            logits, _ = ctx.saved_tensors
            torch.ops.megatron_rl.rescale_if_(logits, grad.contiguous(), 1.0)
            torch.autograd.graph.increment_version(logits)
            return logits, None, None, None, None, None
        logits, targets, params = ctx.saved_tensors
        gradient = write_gradient(
            logits, targets, params, grad.contiguous(), ctx.shard, overwrite=ctx.overwrite_logits
        )
        return gradient, None, None, None, None, None


class LinearPolicyLossFunction(torch.autograd.Function):
    """LM head and loss in row chunks: three products, the gradient written in the forward.

    A chunk's logits become their own gradient before the next chunk's are computed, since the
    loss of a token needs nothing of other tokens. The backward only scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        inputs: LossInputs,
        shard: Shard,
        chunk_size: int,
        into_main_grad: bool,
        has_grad: bool,
    ) -> Results:
        wants_hidden, wants_weight = (has_grad and wants for wants in ctx.needs_input_grad[:2])
        dtype = compute_dtype(hidden.dtype)
        inputs = inputs.to(dtype)
        chunks = row_slices(len(hidden), chunk_size)
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = (
            HeadGradient(weight, num_chunks=len(chunks), into_main_grad=into_main_grad)
            if wants_weight
            else None
        )
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        chunks = chunks or [slice(0, 0)]  # zero rows have their sums too
        memory = hidden.new_empty(chunk_size, len(weight))
        parts = []
        for rows in chunks:
            logits = torch.mm(hidden[rows], weight.T, out=memory[: rows.stop - rows.start])
            logprobs[rows], sums, extrema = _turn_into_gradient(
                logits, targets[rows], inputs.at(rows), shard, wants=wants_hidden or wants_weight
            )
            parts.append((sums, extrema))
            if hidden_grad is not None:
                torch.mm(logits, weight, out=hidden_grad[rows])
            if head_grad is not None:
                head_grad.add(logits, hidden[rows])
        sums = torch.stack([part[0] for part in parts]).sum(0)
        extrema = torch.stack([part[1] for part in parts]).amax(0)
        ctx.hidden_grad, ctx.head_grad, ctx.is_spent = hidden_grad, head_grad, False
        return _mark(ctx, (sums[-1].to(dtype), logprobs, sums, extrema))

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
            torch.ops.megatron_rl.rescale_if_(hidden_grad, grad.contiguous(), 1.0)
        if head_grad is not None:
            head_grad.rescale(grad)
            weight_grad = head_grad.hand_over()
        return hidden_grad, weight_grad, None, None, None, None, None, None


def write_gradient(
    logits: Tensor,
    targets: Tensor,
    params: Tensor,
    grad: Tensor | None,
    shard: Shard,
    *,
    overwrite: bool,
) -> Tensor:
    """The gradient of logits, in their place or in memory of its own."""
    arguments = (targets, params, grad, shard.vocab_start, shard.valid_vocab, shard.inv_temp)
    if not overwrite:
        gradient: Tensor = torch.ops.megatron_rl.dlogits(logits, *arguments)
        return gradient
    torch.ops.megatron_rl.dlogits_(logits, *arguments)
    torch.autograd.graph.increment_version(logits)
    return logits


def _measure(
    logits: Tensor, targets: Tensor, inputs: LossInputs, shard: Shard
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, params, loss, sums, extrema) of logits, which stay; joins one all-gather."""
    stats = torch.ops.megatron_rl.row_stats(
        logits,
        targets,
        inputs.weights,
        shard.vocab_start,
        shard.valid_vocab,
        shard.inv_temp,
        inputs.with_entropy,
    )
    logprobs, _, params, loss, sums, extrema = torch.ops.megatron_rl.token_loss(
        gather_stats(stats, shard.tp_group), *inputs.arguments(), shard.inv_temp
    )
    return logprobs, params, loss, sums, extrema


def _turn_into_gradient(
    logits: Tensor,
    targets: Tensor,
    inputs: LossInputs,
    shard: Shard,
    *,
    wants: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, sums, extrema) of a chunk; its logits are their gradient afterwards, if wanted."""
    if wants and shard.is_whole:
        logprobs, _, _, sums, extrema = torch.ops.megatron_rl.policy_loss_onepass_(
            logits, targets, *inputs.arguments(), shard.valid_vocab, shard.inv_temp, 1.0
        )
        return logprobs, sums, extrema
    logprobs, params, _, sums, extrema = _measure(logits, targets, inputs, shard)
    if wants:
        write_gradient(logits, targets, params, None, shard, overwrite=True)
    return logprobs, sums, extrema
