"""Log-probabilities and entropies of a softmax whose vocabulary is split over tp ranks.

Three pure steps: local statistics of a shard, the merge of all shards' statistics, and the gradient
of a shard. Each has a native op, and beside it the definition that the op must equal.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops import backend

# exp() of this is 0 in float64, and 0 times it is 0: stands for -inf where a product follows.
_LOG_ZERO = -1e4


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    valid_vocab: int,
    temperature: float,
    with_entropy: bool,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of each row, in nats, equal on all tp ranks.

    Differentiable in logits: the gradients that arrive must be equal on all tp ranks, and each
    rank gets the gradient of its own shard, rounded once to the dtype of logits.

    Args:
        logits: [N, V/tp], this rank's columns, any float dtype. Computed in float64 if float64,
            else in float32, which is also the dtype of the results.
        targets: [N] int64 global token ids, equal on all ranks. One outside [0, valid_vocab) has
            log-probability -inf.
        tp_group: joins one all-gather of 4 numbers a row, in the forward only. None: unsharded.
        vocab_start: global id of this rank's first column.
        valid_vocab: columns from this global id on are padding: they count for nothing.
        temperature: logits are divided by it, in the compute dtype.
        with_entropy: whether the second result is [N] or None.
        overwrite_logits: let the backward of native ops put the gradient where the logits are; then
            a later backward that needs these logits raises.
    """
    _check_rows(logits, targets)
    logprobs, entropy = _VocabParallelLogprobs.apply(
        logits,
        targets,
        tp_group,
        shard_columns(logits.size(1), vocab_start, valid_vocab),
        vocab_start,
        temperature,
        with_entropy,
        overwrite_logits,
    )
    return logprobs, entropy if with_entropy else None


def shard_columns(num_columns: int, vocab_start: int, valid_vocab: int) -> int:
    """How many of a shard's columns are vocabulary, not padding; they are its first ones."""
    return min(max(valid_vocab - vocab_start, 0), num_columns)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a softmax over logits of this dtype is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_slices(num_rows: int, size: int) -> list[slice]:
    """Chunks of `size` rows, the last one of what is left; none of zero rows."""
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, max(size, 1))]


def shard_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    num_valid: int,
    vocab_start: int,
    temperature: float,
    with_entropy: bool = True,
) -> Tensor:
    """[N, 4] of one shard, z being scaled logits: max z, sum e, sum e * (z - max), z[target].

    e = exp(z - max). The target's z is -inf in the shards that do not own it, and a shard of
    nothing but padding is (-inf, 0, 0, -inf). Native ops leave the third one 0 if nobody asks for
    the entropy.
    """
    if backend.is_native("row_stats", logits):
        stats: Tensor = torch.ops.megatron_rl.row_stats(
            with_dense_rows(logits),
            targets.contiguous(),
            None,
            vocab_start,
            vocab_start + num_valid,
            1.0 / temperature,
            with_entropy,
        )
        return stats
    return shard_stats_definition(
        logits, targets, num_valid=num_valid, vocab_start=vocab_start, temperature=temperature
    )


def with_dense_rows(logits: Tensor) -> Tensor:
    """The same logits, copied if the columns of a row are not next to each other."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def shard_stats_definition(
    logits: Tensor, targets: Tensor, *, num_valid: int, vocab_start: int, temperature: float
) -> Tensor:
    """What the native op must equal, and what runs where there is none."""
    dtype = compute_dtype(logits.dtype)
    if num_valid == 0:
        return torch.tensor(
            [-torch.inf, 0.0, 0.0, -torch.inf], dtype=dtype, device=logits.device
        ).expand(len(logits), 4)
    scaled = logits[:, :num_valid].to(dtype) * (1.0 / temperature)
    row_max = scaled.amax(dim=1)
    local_targets = targets - vocab_start
    owned = (local_targets >= 0) & (local_targets < num_valid)
    picked = scaled.gather(1, local_targets.where(owned, 0)[:, None])[:, 0]
    finite_max = row_max.where(row_max > -torch.inf, 0.0)
    shifted = (scaled - finite_max[:, None]).clamp(min=_LOG_ZERO)
    weights = shifted.exp()
    return torch.stack(
        [
            row_max,
            weights.sum(dim=1),
            (weights * shifted).sum(dim=1),
            picked.where(owned, -torch.inf),
        ],
        dim=1,
    )


def gather_stats(stats: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[N, 4] of this rank -> [tp, N, 4] in rank order: the one collective."""
    num_ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    if num_ranks == 1 or len(stats) == 0:
        return stats.expand(num_ranks, *stats.shape)
    gathered = stats.new_empty(num_ranks * len(stats), 4)
    dist.all_gather_into_tensor(gathered, stats.contiguous(), group=tp_group)
    return gathered.view(num_ranks, len(stats), 4)


def merge_stats(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[tp, N, 4] -> logprobs, entropy and log-sum-exp, each [N]: the same bits on every rank."""
    if backend.is_native("merge_stats", gathered):
        logprobs, entropy, log_sum_exp = torch.ops.megatron_rl.merge_stats(gathered.contiguous())
        return logprobs, entropy, log_sum_exp
    return merge_stats_definition(gathered)


def merge_stats_definition(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the native op must equal, and what runs where there is none."""
    maxima, target_logits = gathered[:, :, 0], gathered[:, :, 3]
    row_max = maxima.amax(dim=0)
    total = torch.zeros_like(row_max)
    weighted = torch.zeros_like(row_max)
    for shard in gathered:  # rank order: a sum in another order would have other bits
        shift = (shard[:, 0] - row_max).clamp(min=_LOG_ZERO)
        scale = shift.exp()
        total = total + scale * shard[:, 1]
        weighted = weighted + scale * (shard[:, 2] + shard[:, 1] * shift)
    log_total = total.log()
    logprobs = target_logits.amax(dim=0) - row_max - log_total
    return logprobs, log_total - weighted / total, row_max + log_total


def shard_gradient(
    logits: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    logprobs_grad: Tensor | None,
    entropy_grad: Tensor | None,
    *,
    num_valid: int,
    vocab_start: int,
    temperature: float,
    overwrite: bool = False,
) -> Tensor:
    """[N, V/tp] gradient of a shard's logits, rounded once; exactly 0 in the padding.

    d logprob / dz_i = [i = target] - p_i and d entropy / dz_i = -p_i * (log p_i + entropy).
    Native ops put it where the logits are if told to overwrite them.
    """
    if not backend.is_native("dlogits_", logits):
        return shard_gradient_definition(
            logits, targets, log_sum_exp, entropy, logprobs_grad, entropy_grad,
            num_valid=num_valid, vocab_start=vocab_start, temperature=temperature,
        )  # fmt: skip
    zeros = torch.zeros_like(log_sum_exp)
    of_target = zeros if logprobs_grad is None else logprobs_grad / temperature
    of_entropy = zeros if entropy_grad is None else entropy_grad / temperature
    # As csrc/dlogits/gradient_row.h takes them. An entropy that has no gradient may be anything.
    of_all = -of_target if entropy_grad is None else -(of_target + entropy * of_entropy)
    params = torch.stack([log_sum_exp, of_target, of_entropy, of_all], dim=1)
    settings = (
        targets.contiguous(),
        params,
        None,
        vocab_start,
        vocab_start + num_valid,
        1.0 / temperature,
    )
    if overwrite and logits.stride(1) == 1:
        torch.ops.megatron_rl.dlogits_(logits, *settings)
        torch.autograd.graph.increment_version(logits)
        return logits
    gradient: Tensor = torch.ops.megatron_rl.dlogits(with_dense_rows(logits), *settings)
    return gradient


def shard_gradient_definition(
    logits: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    logprobs_grad: Tensor | None,
    entropy_grad: Tensor | None,
    *,
    num_valid: int,
    vocab_start: int,
    temperature: float,
) -> Tensor:
    """What the native op must equal, and what runs where there is none."""
    gradient = torch.zeros_like(logits)
    if num_valid == 0:
        return gradient
    scaled = logits[:, :num_valid].to(log_sum_exp.dtype) * (1.0 / temperature)
    log_p = (scaled - log_sum_exp[:, None]).clamp(min=_LOG_ZERO)
    p = log_p.exp()
    total = torch.zeros_like(p)
    if entropy_grad is not None:
        total -= p * (log_p + entropy[:, None]) * entropy_grad[:, None]
    if logprobs_grad is not None:
        total -= p * logprobs_grad[:, None]
        local_targets = targets - vocab_start
        owned = (local_targets >= 0) & (local_targets < num_valid)
        total.scatter_add_(
            1, local_targets.where(owned, 0)[:, None], logprobs_grad.where(owned, 0.0)[:, None]
        )
    gradient[:, :num_valid] = total * (1.0 / temperature)
    return gradient


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        tp_group: dist.ProcessGroup | None,
        num_valid: int,
        vocab_start: int,
        temperature: float,
        with_entropy: bool,
        overwrite_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.overwrite_logits = overwrite_logits
        ctx.shard = {
            "num_valid": num_valid,
            "vocab_start": vocab_start,
            "temperature": temperature,
        }
        ctx.set_materialize_grads(False)  # an entropy that is only a metric costs no backward
        stats = shard_stats(logits, targets, with_entropy=with_entropy, **ctx.shard)
        logprobs, entropy, log_sum_exp = merge_stats(gather_stats(stats, tp_group))
        ctx.save_for_backward(logits, targets, log_sum_exp, entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprobs_grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum_exp, entropy = ctx.saved_tensors
        gradient = shard_gradient(
            logits,
            targets,
            log_sum_exp,
            entropy,
            logprobs_grad,
            entropy_grad,
            overwrite=ctx.overwrite_logits,
            **ctx.shard,
        )
        return gradient, None, None, None, None, None, None, None


def _check_rows(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits [N, V/tp] and targets [N], got {list(logits.shape)} and "
            f"{list(targets.shape)}: flatten the rows first"
        )
