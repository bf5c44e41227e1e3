"""Tokens for tests of a loss that are about its numbers alone."""

import torch

from megatron_rl.types import LossTokens


def tokens_of(weights, advantages, **constants):
    """Tokens that stand one after another in a row, all with target 0."""
    at = torch.arange(len(weights))
    return LossTokens(
        at=at, targets=torch.zeros_like(at), weights=weights, advantages=advantages, **constants
    )
