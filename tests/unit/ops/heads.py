"""Heads for tests that are about logits."""

import torch

from megatron_rl.ops.head import Head
from megatron_rl.ops.vocab_parallel import Shard


def head_of(logits, *, valid_vocab=None, temperature=1.0):
    """A head whose logits are exactly these finite ones, and whose weight gets their gradient.

    Its hidden states are the unit vectors, so each product is one logit plus zeros.
    """
    valid_vocab = logits.size(1) if valid_vocab is None else valid_vocab
    return Head(
        hidden=torch.eye(len(logits), dtype=logits.dtype),
        head_weight=logits.T,
        shard=Shard(None, 0, valid_vocab, temperature),
    )
