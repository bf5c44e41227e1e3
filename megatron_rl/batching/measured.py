"""Responses that are scored without being trained on."""

from collections.abc import Sequence

from megatron_rl.types import RolloutGroup, Sample


def measured_samples(groups: Sequence[RolloutGroup]) -> list[Sample]:
    """Every response of the groups that has a token, as a sample without an advantage."""
    return [
        Sample(
            group_id=group.prompt.group_id,
            index=index,
            update=0,
            prompt_tokens=group.prompt.tokens,
            response_tokens=rollout.response_tokens,
            advantage=0.0,
            rollout_logprobs=rollout.rollout_logprobs,
        )
        for group in groups
        for index, rollout in enumerate(group.rollouts)
        if len(rollout.response_tokens)
    ]
