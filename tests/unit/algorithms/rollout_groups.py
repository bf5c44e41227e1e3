"""Groups of rollouts with given rewards; token ids and log-probs are arbitrary but distinct."""

import torch

from megatron_rl.types import Prompt, Rollout, RolloutGroup


def make_group(group_id, rewards, *, lengths=None, finish_reason="stop"):
    lengths = lengths or [index + 2 for index in range(len(rewards))]
    rollouts = tuple(
        Rollout(
            response_tokens=torch.arange(length) + 100 * index,
            rollout_logprobs=torch.full((length,), -0.5 - index),
            finish_reason=finish_reason,
            policy_version=0,
            reward=reward,
        )
        for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
    )
    prompt = Prompt(group_id=group_id, tokens=torch.tensor([7, group_id]), answer="")
    return RolloutGroup(prompt=prompt, rollouts=rollouts)
