"""A checksum that commutes with layouts.

The checksum of a Hugging Face tensor is the sum over its elements of bits * h0(row) * h1(column)
modulo 2^64, where h0 and h1 are odd hashes of the position in that tensor. Any cut into rectangles
gives the same total in any order, so shards on both sides of the bridge are summed where they are
and compared per tensor with one all-reduce of int64. Unlike a plain sum it changes when rows, heads
or columns are swapped.
"""

import torch
from torch import Tensor

from megatron_rl.weights.pieces import Box

_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)  # odd, well mixed bits
INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor, box: Box) -> Tensor:
    """The int64 scalar, on the values' device, of the rectangle `box` of a Hugging Face tensor."""
    total = values.contiguous().view(INTEGER_OF[values.element_size()]).to(torch.int64)
    for dim, (lo, hi) in enumerate(box):
        shape = [1] * len(box)
        shape[dim] = hi - lo
        total = total * _odd_hash(lo, hi, dim, values.device).view(shape)
    return total.sum()


def _odd_hash(lo: int, hi: int, dim: int, device: torch.device) -> Tensor:
    """[hi - lo] odd int64: an even factor would lose bits of what it multiplies."""
    position = torch.arange(lo + 1, hi + 1, dtype=torch.int64, device=device)
    mixed = position * _MULTIPLIERS[dim % 2]
    mixed = (mixed ^ (mixed >> 29)) * _MULTIPLIERS[(dim + 1) % 2]
    return (mixed ^ (mixed >> 32)) | 1
