"""Loss of logits that are in memory, for models that hand them out; else see linear_loss."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.ops import backend
from megatron_rl.ops.native_loss import LossInputs, PolicyLossFunction, Shard
from megatron_rl.ops.token_loss import LossSpec, TokenLoss, check_inputs, token_loss
from megatron_rl.ops.vocab_parallel import vocab_parallel_logprobs, with_dense_rows


def policy_loss(
    logits: Tensor,
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
    overwrite_logits: bool = False,
) -> tuple[TokenLoss, Tensor]:
    """Loss of N rows, and their log-probabilities, detached; 0 at weight 0.

    Args:
        logits: [N, V/tp] of any float dtype; else as in vocab_parallel_logprobs.
        targets, tp_group, vocab_start, valid_vocab, temperature: as there.
        old_logprobs, ref_logprobs, rollout_logprobs, advantages, weights, spec: as in token_loss.
        with_entropy: measure the entropy even if spec.entropy_coef is 0.
        overwrite_logits: let native ops put the gradient where the logits are: in the forward if
            the vocabulary is not split, else in the backward. Whatever else needs these logits
            after that raises in its backward.
    """
    if logits.dim() == 2 and backend.is_native("policy_loss_onepass_", logits):
        needed = logits if with_entropy or spec.entropy_coef != 0 else None
        check_inputs(spec, entropy=needed, ref=ref_logprobs, rollout=rollout_logprobs)
        loss, logprobs, sums, extrema = PolicyLossFunction.apply(
            with_dense_rows(logits),
            targets.contiguous(),
            LossInputs(
                old_logprobs, ref_logprobs, rollout_logprobs, advantages, weights, spec,
                with_entropy,
            ),
            Shard(tp_group, vocab_start, valid_vocab, 1.0 / temperature),
            overwrite_logits,
            logits.requires_grad and torch.is_grad_enabled(),
        )  # fmt: skip
        return TokenLoss(loss=loss, sums=sums, extrema=extrema), logprobs
    logprobs, entropy = vocab_parallel_logprobs(
        logits,
        targets,
        tp_group=tp_group,
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        temperature=temperature,
        with_entropy=with_entropy or spec.entropy_coef != 0,
        overwrite_logits=overwrite_logits,
    )
    result = token_loss(
        logprobs,
        entropy,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        weights=weights,
        spec=spec,
    )
    return result, logprobs.detach().where(weights != 0, 0.0)
