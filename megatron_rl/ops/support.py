"""A softmax over a part of the vocabulary: the tokens that sampling could choose from.

Where tokens were drawn with top-k and top-p, every log-probability of them is one of this
distribution, at any weights (Keep Sampling Mask of DeepSeek-V3.2, arXiv:2512.02556, 3.1): else a
ratio would compare a probability among some tokens with one among all.
"""

import torch
from torch import Tensor

from megatron_rl.ops.vocab_parallel import Shard


def keep_support(logits: Tensor, support: Tensor | None, shard: Shard) -> Tensor:
    """The logits, which become -inf in place outside of the support: so they count for nothing.

    Args:
        logits: [N, V/tp], this rank's columns, any float dtype.
        support: [N, K] token ids, each once in a row, and -1 behind the last; None: all tokens.
        shard: which columns these are.
    """
    if support is None or not logits.numel():
        return logits
    columns = support.long() - shard.vocab_start
    is_here = (support >= 0) & (columns >= 0) & (columns < logits.size(1))
    columns = columns.where(is_here, 0)
    kept = logits.gather(1, columns).masked_fill(~is_here, -torch.inf)
    # Ids of other shards, and -1, all stand at column 0, where the largest is what it had, or -inf.
    return logits.fill_(-torch.inf).scatter_reduce_(1, columns, kept, "amax")
