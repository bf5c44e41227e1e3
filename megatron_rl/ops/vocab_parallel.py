"""Log-probabilities and entropies of a softmax whose vocabulary is split over tp ranks.

Three pure steps: local statistics of a shard, the merge of all shards' statistics, and the gradient
of a shard. Each has a native op, and beside it the definition that the op must equal.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.ops import backend

# Stands in for -inf: exp(-1e4) is exactly 0 and 0 * -1e4 is 0, while 0 * -inf would be NaN.
_LOG_ZERO = -1e4


class Shard(NamedTuple):
    """This rank's columns of a vocabulary that is split over tp ranks, and their temperature."""

    tp_group: dist.ProcessGroup | None  # None: the vocabulary is not split
    vocab_start: int  # global id of the first column
    valid_vocab: int  # columns from this global id on are padding: they count for nothing
    temperature: float  # logits are divided by it, in the compute dtype

    @property
    def is_whole(self) -> bool:
        """True where no other rank has columns."""
        return self.tp_group is None or dist.get_world_size(self.tp_group) == 1

    def num_valid(self, num_columns: int) -> int:
        """How many of the shard's columns are vocabulary, not padding; they are its first ones."""
        return min(max(self.valid_vocab - self.vocab_start, 0), num_columns)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a softmax over logits of this dtype is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_slices(num_rows: int, size: int) -> list[slice]:
    """Slices of `size` rows, the last one of what is left; none where there are no rows."""
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, max(size, 1))]


def shard_stats(logits: Tensor, targets: Tensor, shard: Shard) -> Tensor:
    """[N, 4] of one shard, z being scaled logits: max z, sum e, sum e * (z - max), z[target].

    e = exp(z - max). The target's z is -inf in the shards that do not own it, and a shard of
    nothing but padding is (-inf, 0, 0, -inf).

    Args:
        logits: [N, V/tp], this rank's columns, any float dtype.
        targets: [N] int64 global token ids.
        shard: which columns these are.
    """
    if backend.is_native("row_stats", logits):
        stats: Tensor = torch.ops.megatron_rl.row_stats(
            with_dense_rows(logits),
            targets.contiguous(),
            None,
            shard.vocab_start,
            shard.vocab_start + shard.num_valid(logits.size(1)),
            1.0 / shard.temperature,
            True,
        )
        return stats
    return shard_stats_definition(logits, targets, shard)


def with_dense_rows(logits: Tensor) -> Tensor:
    """The same logits, copied if the columns of a row are not next to each other."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def shard_stats_definition(logits: Tensor, targets: Tensor, shard: Shard) -> Tensor:
    """The same in PyTorch: the native op must equal it, and it runs where there is none."""
    dtype, num_valid = compute_dtype(logits.dtype), shard.num_valid(logits.size(1))
    if num_valid == 0:
        nothing = logits.new_zeros(len(logits), 4, dtype=dtype)
        nothing[:, ::3] = -torch.inf
        return nothing
    scaled = logits[:, :num_valid].to(dtype) * (1.0 / shard.temperature)
    row_max = scaled.amax(dim=1)
    local_targets = targets - shard.vocab_start
    owned = (local_targets >= 0) & (local_targets < num_valid)
    picked = scaled.gather(1, local_targets.where(owned, 0)[:, None])[:, 0]
    finite_max = row_max.where(row_max > -torch.inf, 0.0)  # -inf less -inf would be NaN
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
    """The same in PyTorch: the native op must equal it, and it runs where there is none."""
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
    # Entropy is log sum e - (sum e * (z - max)) / sum e.
    logprobs = target_logits.amax(dim=0) - row_max - log_total
    return logprobs, log_total - weighted / total, row_max + log_total


def shard_gradient(
    logits: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    logprobs_grad: Tensor | None,
    entropy_grad: Tensor | None,
    shard: Shard,
) -> Tensor:
    """[N, V/tp] gradient of a shard's logits, rounded once; exactly 0 in the padding.

    d logprob / dz_i = [i = target] - p_i and d entropy / dz_i = -p_i * (log p_i + entropy).
    All other tensors are [N].
    """
    if not backend.is_native("dlogits", logits):
        return shard_gradient_definition(
            logits, targets, log_sum_exp, entropy, logprobs_grad, entropy_grad, shard
        )
    zeros = torch.zeros_like(log_sum_exp)
    of_target = zeros if logprobs_grad is None else logprobs_grad / shard.temperature
    of_entropy = zeros if entropy_grad is None else entropy_grad / shard.temperature
    # As csrc/dlogits/gradient_row.h takes them. An entropy without gradient may be anything, so it
    # is not multiplied by 0.
    of_all = -of_target if entropy_grad is None else -(of_target + entropy * of_entropy)
    gradient: Tensor = torch.ops.megatron_rl.dlogits(
        with_dense_rows(logits),
        targets.contiguous(),
        torch.stack([log_sum_exp, of_target, of_entropy, of_all], dim=1),
        None,
        shard.vocab_start,
        shard.vocab_start + shard.num_valid(logits.size(1)),
        1.0 / shard.temperature,
    )
    return gradient


def shard_gradient_definition(
    logits: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    entropy: Tensor,
    logprobs_grad: Tensor | None,
    entropy_grad: Tensor | None,
    shard: Shard,
) -> Tensor:
    """The same in PyTorch: the native op must equal it, and it runs where there is none."""
    gradient = torch.zeros_like(logits)
    num_valid = shard.num_valid(logits.size(1))
    if num_valid == 0:
        return gradient
    scaled = logits[:, :num_valid].to(log_sum_exp.dtype) * (1.0 / shard.temperature)
    log_p = (scaled - log_sum_exp[:, None]).clamp(min=_LOG_ZERO)
    p = log_p.exp()
    total = torch.zeros_like(p)
    if entropy_grad is not None:
        total -= p * (log_p + entropy[:, None]) * entropy_grad[:, None]
    if logprobs_grad is not None:
        total -= p * logprobs_grad[:, None]
        local_targets = targets - shard.vocab_start
        owned = (local_targets >= 0) & (local_targets < num_valid)
        total.scatter_add_(
            1, local_targets.where(owned, 0)[:, None], logprobs_grad.where(owned, 0.0)[:, None]
        )
    gradient[:, :num_valid] = total * (1.0 / shard.temperature)
    return gradient
