"""Sample tokens with top-k and top-p from a softmax whose vocabulary is split over tp ranks.

Every rank finds the best of its own columns, all of them merge these, and draw by the noise that
ops/sample.py has for them. Equal logits go by their ids, so the tokens to choose from do not depend
on the layout either, but where logits that are rounded differently are nearly equal.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.ops.philox import words_of_ids
from megatron_rl.ops.sample import gumbel
from megatron_rl.ops.vocab_parallel import Shard, compute_dtype

_ID_BITS = 31


class Truncation(NamedTuple):
    """What a token is drawn from: the top_k most probable ones, and of those the fewest whose
    probabilities among them reach top_p together.
    """

    top_k: int  # at least 1
    top_p: float = 1.0  # in (0, 1]


class Truncated(NamedTuple):
    """What was drawn, and from what."""

    tokens: Tensor  # [N] int64
    logprobs: Tensor  # [N] float32 or float64, under the softmax over the support alone
    support: Tensor  # [N, K] int64 ids, most probable first, -1 behind the last; K <= top_k


def sample_truncated(
    logits: Tensor,
    shard: Shard,
    seeds: Tensor,
    places: Tensor,
    temperatures: Tensor,
    *,
    truncation: Truncation,
) -> Truncated:
    """Tokens, the same bits on all tp ranks; logits [N, V/tp], the others as in
    sample_from_head, of no row greedy.

    Collectives: one all-gather of 2 * top_k numbers a row.
    """
    best = _merged(_best_of_shard(logits, shard, temperatures, truncation.top_k), shard)
    scaled, ids = best[:, :, 0], best[:, :, 1].long()
    probs = scaled.softmax(dim=1)
    before = probs.cumsum(dim=1) - probs  # of the tokens that are more probable
    is_kept = ids >= 0
    if truncation.top_p < 1:  # else rounding might leave out the least probable ones
        is_kept &= before < truncation.top_p
    is_kept[:, 0] = True  # of a row that is nan, too: its log-prob will say so
    scaled = scaled.masked_fill(~is_kept, -torch.inf)
    noise = gumbel(words_of_ids(seeds, places, ids.clamp(min=0)))
    at = (scaled + noise).argmax(dim=1, keepdim=True)
    logprobs = (scaled.gather(1, at) - scaled.logsumexp(dim=1, keepdim=True))[:, 0]
    return Truncated(
        tokens=ids.gather(1, at)[:, 0],
        logprobs=logprobs.to(compute_dtype(logits.dtype)),
        support=ids.masked_fill(~is_kept, -1),
    )


def _best_of_shard(logits: Tensor, shard: Shard, temperatures: Tensor, top_k: int) -> Tensor:
    """[N, top_k, 2] float64 scaled logits and ids of a shard's best, and (-inf, -1) behind them."""
    num_valid = shard.num_valid(logits.size(1))
    best = logits.new_full((len(logits), top_k, 2), -torch.inf, dtype=torch.float64)
    best[:, :, 1] = -1
    count = min(top_k, num_valid)
    if count:
        inverse = (1.0 / temperatures).to(compute_dtype(logits.dtype))
        scaled = logits[:, :num_valid].to(inverse.dtype) * inverse[:, None]
        at = _ranks(scaled).topk(count, dim=1).indices
        best[:, :count, 0] = scaled.gather(1, at).double()
        best[:, :count, 1] = (at + shard.vocab_start).double()
    return best


def _ranks(scaled: Tensor) -> Tensor:
    """[N, V] int64 that order as (float32 of scaled, then smaller ids first), none of them equal.

    The bits of a float32 order as its value does, once those of a negative number are turned over.
    """
    bits = (scaled.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << _ID_BITS) - torch.arange(scaled.size(1), device=scaled.device)


def _merged(best: Tensor, shard: Shard) -> Tensor:
    """[N, top_k, 2] of all shards together, most probable first."""
    if shard.is_whole:
        return best
    assert shard.tp_group is not None
    tp = dist.get_world_size(shard.tp_group)
    gathered = best.new_empty(tp * len(best), *best.shape[1:])
    dist.all_gather_into_tensor(gathered, best.contiguous(), group=shard.tp_group)
    # Shards stand in the order of their ids, so a stable sort has smaller ids first among equals.
    every = gathered.view(tp, *best.shape).transpose(0, 1).flatten(1, 2)
    by_value = every[:, :, 0].float().argsort(dim=1, descending=True, stable=True)
    order = by_value[:, : best.size(1), None].expand(-1, -1, 2)
    return every.gather(1, order)
