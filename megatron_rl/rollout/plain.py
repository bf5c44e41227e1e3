"""Groups of rollouts as files hold them: of what torch loads without running code."""

from dataclasses import fields
from typing import Any

from megatron_rl.types import Prompt, Rollout, RolloutGroup, Verdict


def plain_group(group: RolloutGroup) -> dict[str, Any]:
    """The group as plain values and tensors."""
    return {
        "prompt": _plain(group.prompt),
        "rollouts": [_plain(rollout) for rollout in group.rollouts],
    }


def group_of(plain: dict[str, Any]) -> RolloutGroup:
    """The group that plain_group has written so."""
    return RolloutGroup(
        prompt=Prompt(**plain["prompt"]),
        rollouts=tuple(
            Rollout(**{**each, "verdict": each["verdict"] and Verdict(each["verdict"])})
            for each in plain["rollouts"]
        ),
    )


def _plain(carrier: Prompt | Rollout) -> dict[str, Any]:
    values = {field.name: getattr(carrier, field.name) for field in fields(carrier)}
    if isinstance(carrier, Rollout):
        values["verdict"] = None if carrier.verdict is None else str(carrier.verdict)
        values["reward_parts"] = dict(carrier.reward_parts)
    return values
