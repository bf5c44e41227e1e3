"""Sample tokens from a softmax whose vocabulary is split over tp ranks.

The token is the argmax of scaled logits plus Gumbel noise, which is a sample of their softmax. The
noise of a token is a function of the request's seed, the place in its response and the token's id
(philox.py), so a request has the same response at every layout and beside any others, but where
logits that are rounded differently are nearly equal.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.ops import backend, native
from megatron_rl.ops.fused_layers import run_natively
from megatron_rl.ops.philox import words_of_tokens
from megatron_rl.ops.products import product
from megatron_rl.ops.vocab_parallel import Shard, compute_dtype, row_slices, with_dense_rows

NUM_STATS = 5

MANY_ROWS, COLUMNS_OF_A_BLOCK = 48, 16384
"""On a CPU, from so many rows on, logits are made and drawn from in blocks of so many columns,
which stay in the caches."""

MOST_STATES = 1 << 16
"""Up to so many numbers, hidden states stay in a cache beside a block of the head, and one op makes
and draws from a block at a time. docs/kernels.md has what each of the three ways takes."""


def sample_from_head(
    hidden: Tensor,
    weight: Tensor,
    shard: Shard,
    seeds: Tensor,
    places: Tensor,
    temperatures: Tensor,
    *,
    of_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(tokens [N] int64, their log-probs [N] float32 or float64), the same bits on all tp ranks.

    Collectives: one all-gather of 5 numbers a row, or a row and a block of columns.

    Args:
        hidden: [M, H] final hidden states, any float dtype.
        weight: [V/tp, H] of the head, this rank's rows: logits are hidden @ weight.T.
        shard: which columns of the logits these are; its temperature is not looked at.
        seeds: [N] int64 of the requests.
        places: [N] int64, of the token in its response.
        temperatures: [N] float64; 0 takes the most probable token, and its log-prob at 1.
        of_rows: [N] int64, the hidden state of each token; None: one each.
    """
    if of_rows is None and _is_for_one_op(hidden, weight):
        stats = torch.ops.megatron_rl.draw_from_head(
            hidden.contiguous(),
            weight,
            seeds.contiguous(),
            places.contiguous(),
            temperatures.contiguous(),
            shard.vocab_start,
            shard.valid_vocab,
        )
        return _drawn(stats[None], shard.tp_group, hidden.dtype)
    in_blocks = hidden.device.type == "cpu" and len(seeds) >= MANY_ROWS
    size = COLUMNS_OF_A_BLOCK if in_blocks else len(weight)
    blocks = []
    for columns in row_slices(len(weight), size):
        logits = product(hidden, weight[columns].T)
        if of_rows is not None:
            logits = logits.index_select(0, of_rows)
        own = shard._replace(vocab_start=shard.vocab_start + columns.start)
        blocks.append(draw_stats(logits, own, seeds, places, temperatures))
    return _drawn(torch.stack(blocks), shard.tp_group, hidden.dtype)


def _is_for_one_op(hidden: Tensor, weight: Tensor) -> bool:
    return (
        hidden.numel() <= MOST_STATES
        and weight.is_contiguous()
        and run_natively(hidden, weight)
        and native.has_wide_vectors()
    )


def _drawn(
    stats: Tensor, tp_group: dist.ProcessGroup | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of the statistics [B, N, 5] of this rank's blocks of columns; dtype: of logits."""
    tokens, logprobs = merge_draws(_gathered(stats, tp_group))
    return tokens, logprobs.to(compute_dtype(dtype))


def draw_stats(
    logits: Tensor, shard: Shard, seeds: Tensor, places: Tensor, temperatures: Tensor
) -> Tensor:
    """[N, 5] float64 of a shard, z being scaled logits: max z, sum exp(z - max), and of the token
    with the largest z + noise: that sum, its z and its id.

    A shard of nothing but padding is (-inf, 0, -inf, -inf, 0).
    """
    if backend.is_native("draw_stats", logits):
        stats: Tensor = torch.ops.megatron_rl.draw_stats(
            with_dense_rows(logits),
            seeds.contiguous(),
            places.contiguous(),
            temperatures.contiguous(),
            shard.vocab_start,
            shard.vocab_start + shard.num_valid(logits.size(1)),
        )
        return stats
    return draw_stats_definition(logits, shard, seeds, places, temperatures)


def draw_stats_definition(
    logits: Tensor, shard: Shard, seeds: Tensor, places: Tensor, temperatures: Tensor
) -> Tensor:
    """The same in PyTorch: the native op must equal it, and it runs where there is none."""
    num_valid = shard.num_valid(logits.size(1))
    stats = logits.new_zeros(len(logits), NUM_STATS, dtype=torch.float64)
    if num_valid == 0:
        stats[:, [0, 2, 3]] = -torch.inf
        return stats
    is_greedy = temperatures == 0
    inverse = (1.0 / temperatures.where(~is_greedy, 1.0)).to(compute_dtype(logits.dtype))
    scaled = logits[:, :num_valid].to(inverse.dtype) * inverse[:, None]
    scores = scaled
    if not bool(is_greedy.all()):
        end = shard.vocab_start + num_valid
        noise = gumbel(words_of_tokens(seeds, places, shard.vocab_start, end)).to(scaled.dtype)
        scores = scaled + noise.masked_fill_(is_greedy[:, None], 0.0)
    best, at = scores.max(dim=1)
    row_max = scaled.amax(dim=1)
    stats[:, 0] = row_max
    stats[:, 1] = (scaled - row_max[:, None]).exp_().sum(dim=1)
    stats[:, 2] = best
    stats[:, 3] = scaled.gather(1, at[:, None])[:, 0]
    stats[:, 4] = at + shard.vocab_start
    return stats


def gumbel(words: Tensor) -> Tensor:
    """Gumbel noise of words [...] of 32 random bits; float64.

    -log(E) of an exponential variable E = -log(1 - u). The largest noise has the smallest u, where
    numbers are finest.
    """
    uniform = (words.double() + 0.5) * 2.0**-32
    return -(-torch.log1p(-uniform)).log()


def merge_draws(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """[shards, N, 5] -> (tokens [N] int64, log-probs [N] float64)."""
    if len(gathered) == 1:
        row_max, total, _, best_z, token = gathered[0].unbind(dim=1)
        return token.long(), best_z - row_max - total.log()
    row_max = gathered[:, :, 0].amax(dim=0)
    total = torch.zeros_like(row_max)
    for shard in gathered:  # rank order: a sum in another order would have other bits
        total = total + (shard[:, 0] - row_max).exp() * shard[:, 1]
    winner = gathered[:, :, 2].argmax(dim=0)
    best = gathered.gather(0, winner[None, :, None].expand(1, -1, NUM_STATS))[0]
    return best[:, 4].long(), best[:, 3] - row_max - total.log()


def _gathered(stats: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """[B, N, 5] of this rank -> [tp * B, N, 5] in the order of columns: the one collective."""
    num_ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    if num_ranks == 1:
        return stats
    gathered = stats.new_empty(num_ranks * len(stats), *stats.shape[1:])
    dist.all_gather_into_tensor(gathered, stats.contiguous(), group=tp_group)
    return gathered
