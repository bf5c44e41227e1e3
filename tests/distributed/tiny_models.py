"""Random models of four layers on disk, and random graded groups to train them on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.types import Prompt, Rollout, RolloutGroup

VOCAB_SIZE = 90  # padded to 128: with four ranks one shard is cut and one is padding alone
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = ("qwen2", "qwen2_tied", "llama", "llama3_rope")

# All correct, all wrong, mixed, graded in between, and alone in their group.
REWARDS: tuple[tuple[float, ...], ...] = (
    (1.0, -1.0, -1.0, 1.0),
    (1.0, 1.0, 1.0),
    (-1.0, -1.0, -1.0),
    (1.0,),
    (-1.0, 1.0),
    (0.5, 1.0, -1.0),
    (-1.0,),
    (1.0, -1.0, -1.0, -1.0),
    (1.0, -1.0, 0.5, 0.5, -1.0),
)
# Without ties, so that best and worst are known: mixed, all correct, all wrong, alone.
RANKED_REWARDS: tuple[tuple[float, ...], ...] = (
    (1.0, -1.0),
    (-0.3, 1.0, -1.0),
    (1.0, 0.5),
    (-0.5, -1.0),
    (0.9, -0.2, 0.1, 0.0),
    (1.0,),
    (-1.0, -0.5, 0.2),
    (0.4, 0.3, -0.1),
)
MAX_RESPONSE_TOKENS = 24


def write_model(name: str, model_dir: Path) -> None:
    """config.json and model.safetensors in float32; norms and biases are random like all others."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(MODELS.index(name))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    if name == "llama3_rope":
        rope = LLAMA3_ROPE
    settings = {**SIZES, "rope_parameters": rope, "tie_word_embeddings": name == "qwen2_tied"}
    if name.startswith("qwen2"):
        model: Any = Qwen2ForCausalLM(Qwen2Config(**settings, rms_norm_eps=1e-6))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings, rms_norm_eps=1e-5))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(model_dir)


def graded_groups(
    rewards_of: Sequence[Sequence[float]] = REWARDS, seed: int = 1
) -> list[RolloutGroup]:
    """One group per row of rewards; lengths are ragged, from a single token on."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for number, rewards in enumerate(rewards_of):
        rollouts = tuple(
            Rollout(
                response_tokens=_tokens(1, MAX_RESPONSE_TOKENS, generator),
                rollout_logprobs=None,
                finish_reason="length" if index == 3 else "stop",
                policy_version=0,
                reward=reward,
            )
            for index, reward in enumerate(rewards)
        )
        groups.append(RolloutGroup(prompt=_prompt(number, generator), rollouts=rollouts))
    return groups


def gold_groups(seed: int = 2) -> list[RolloutGroup]:
    """Groups of one gold response, which has neither a reward nor log-probs."""
    generator = torch.Generator().manual_seed(seed)
    return [
        RolloutGroup(
            prompt=_prompt(number, generator),
            rollouts=(
                Rollout(
                    response_tokens=_tokens(1, MAX_RESPONSE_TOKENS, generator),
                    rollout_logprobs=None,
                    finish_reason="gold",
                    policy_version=0,
                ),
            ),
        )
        for number in range(7)
    ]


def _prompt(number: int, generator: torch.Generator) -> Prompt:
    return Prompt(group_id=11 + 3 * number, tokens=_tokens(1, 9, generator), answer="")


def _tokens(shortest: int, longest: int, generator: torch.Generator) -> Tensor:
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return torch.randint(0, VOCAB_SIZE, (length,), generator=generator)
