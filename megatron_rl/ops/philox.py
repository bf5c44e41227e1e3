"""Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; 2011) in torch.

A generator without a state: its numbers are a function of a key and a counter.
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits each, int64 as all arguments are; they broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product, of whose 64 int64 keeps every one."""
    product = words * factor
    return (product >> 32) & _LOW, product & _LOW


def words_of_tokens(seeds: Tensor, places: Tensor, start: int, end: int) -> Tensor:
    """[N, end - start] int64 words of 32 random bits, for tokens of these ids.

    Each is a function of the request's seed, the token's place in its response and its id, so it
    does not depend on how a vocabulary is split or what else is sampled. seeds, places: [N] int64.
    """
    counters = torch.arange(start // 4, -(-end // 4), device=seeds.device)[None]
    first = start // 4 * 4
    return _four_words(seeds, places, counters).flatten(1)[:, start - first : end - first]


def words_of_ids(seeds: Tensor, places: Tensor, ids: Tensor) -> Tensor:
    """[N, K] the words that words_of_tokens has for these ids [N, K] int64."""
    words = _four_words(seeds, places, ids // 4)
    return words.gather(2, (ids % 4)[:, :, None])[:, :, 0]


def _four_words(seeds: Tensor, places: Tensor, counters: Tensor) -> Tensor:
    """[N, C, 4] words of counters [N or 1, C], each of which is about four ids."""
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    key = (seeds[:, None] & _LOW, (seeds[:, None] >> 32) & _LOW)
    return torch.stack(philox((counters, places[:, None], zero, zero), key), dim=2)
