"""Responses that are scored without being trained on."""

from collections.abc import Sequence

from megatron_rl.types import RolloutGroup, Sample


def measured_samples(groups: Sequence[RolloutGroup], most_each: int | None = None) -> list[Sample]:
    """Every response of the groups that has a token, as a sample without an advantage.

    most_each: of a group, the first so many alone.
    """
    return [
        Sample(
            group_id=group.prompt.group_id,
            index=index,
            update=0,
            prompt_tokens=group.prompt.tokens,
            response_tokens=rollout.response_tokens,
            advantage=0.0,
            rollout_logprobs=rollout.rollout_logprobs,
            experts=rollout.experts,
            support=rollout.support,
        )
        for group in groups
        for index, rollout in enumerate(group.rollouts[:most_each])
        if rollout.num_response_tokens
    ]
