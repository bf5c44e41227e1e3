"""Logits and requests for tests that sample tokens."""

import torch
from torch import Tensor

from megatron_rl.ops.sample import draw_stats, merge_draws
from megatron_rl.ops.vocab_parallel import Shard, compute_dtype

VALID, COLUMNS = 90, 128  # the columns behind the vocabulary are padding


def logits_of(num_rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Padding has the largest ones, so that a token of it would show."""
    logits = 2 * torch.randn(num_rows, COLUMNS, generator=torch.Generator().manual_seed(3)).double()
    logits[:, VALID:] = 50.0
    return logits.to(dtype)


def requests(num_rows: int, temperature: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """(seeds, places, temperatures) of so many tokens."""
    draw = torch.Generator().manual_seed(4)
    seeds = torch.randint(2**62, (num_rows,), generator=draw)
    places = torch.randint(1000, (num_rows,), generator=draw)
    return seeds, places, torch.full((num_rows,), temperature, dtype=torch.float64)


def sample_tokens(logits: Tensor, shard: Shard, *asked: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [N], their log-probs [N]) of all logits [N, V] at once; asked: as from requests."""
    tokens, logprobs = merge_draws(draw_stats(logits, shard, *asked)[None])
    return tokens, logprobs.to(compute_dtype(logits.dtype))
