"""Graded groups and a model that measurements of training share: random, the same in every run."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from megatron_rl.types import Prompt, Rollout, RolloutGroup

VOCAB = 4096
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
"""Of a config.json; a Qwen2 of these has 5 million parameters."""


def synthetic_groups(
    rewards: Iterable[Sequence[float]], *, prompt_tokens: int, response_tokens: tuple[int, int]
) -> list[RolloutGroup]:
    """A group for each entry of rewards, a response for each reward in it.

    response_tokens: the shortest and the longest response.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, VOCAB, (count,), generator=generator)

    def rollout(reward: float) -> Rollout:
        shortest, longest = response_tokens
        count = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return Rollout(
            response_tokens=tokens(count),
            rollout_logprobs=torch.full((count,), -8.0),
            finish_reason="stop",
            policy_version=0,
            reward=reward,
        )

    return [
        RolloutGroup(
            prompt=Prompt(group_id=number, tokens=tokens(prompt_tokens), answer=""),
            rollouts=tuple(rollout(reward) for reward in of_group),
        )
        for number, of_group in enumerate(rewards)
    ]
