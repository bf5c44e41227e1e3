"""The share of the loss that one token has: the only place where a loss is divided."""

from typing import Literal

from megatron_rl.algorithms.presets import AggregationName
from megatron_rl.types import UpdateTotals


def token_weight(
    name: AggregationName,
    totals: UpdateTotals,
    *,
    response_tokens: int,
    max_response_tokens: int,
    normalize_over: Literal["kept", "collected"],
) -> float:
    """Weight of each token of a response of this many tokens, in the update with these totals.

    Under pair_mean it is the weight of the pair that the response belongs to.
    """
    if normalize_over == "kept":
        num_sequences, num_tokens = totals.kept_sequences, totals.kept_tokens
    else:
        num_sequences, num_tokens = totals.collected_sequences, totals.collected_tokens
    if name == "pair_mean":
        return 2.0 / num_sequences
    if name == "token_mean":
        return 1.0 / num_tokens
    if name == "sequence_mean":
        return 1.0 / (num_sequences * response_tokens)
    return 1.0 / (num_sequences * max_response_tokens)
