"""Counts over an iteration's rollouts, to be added over ranks before they become metrics."""

from collections.abc import Mapping, Sequence

from megatron_rl.types import RolloutGroup, Verdict

COUNTS = (
    "groups",
    "groups_all_correct",
    "groups_all_wrong",
    "responses",
    "tokens",
    "truncated",
    "rewarded",  # responses that have a reward: all but failed verifications
    "reward",
    "logprob",
    "logprob_tokens",
    "support",  # tokens that each was drawn from, where that is not the whole vocabulary
    "support_tokens",
    *(f"verdict_{verdict}" for verdict in Verdict),
)

_PART = "part_"


def names(parts: Sequence[str] = ()) -> tuple[str, ...]:
    """COUNTS, and a sum for each named part of the reward."""
    return (*COUNTS, *(f"{_PART}{part}" for part in parts))


def count(groups: Sequence[RolloutGroup], parts: Sequence[str] = ()) -> tuple[list[float], float]:
    """(Sums over this rank's groups, ordered as names(parts); tokens of the longest response)."""
    total = dict.fromkeys(names(parts), 0.0)
    longest = 0
    for group in groups:
        correct = [rollout.verdict is Verdict.CORRECT for rollout in group.rollouts]
        total["groups"] += 1
        total["groups_all_correct"] += all(correct)
        total["groups_all_wrong"] += not any(correct)
        for rollout in group.rollouts:
            length = rollout.num_response_tokens
            longest = max(longest, length)
            total["responses"] += 1
            total["tokens"] += length
            total["truncated"] += rollout.finish_reason == "length"
            if rollout.rollout_logprobs is not None:
                total["logprob"] += float(rollout.rollout_logprobs.double().sum())
                total["logprob_tokens"] += length
            if rollout.support is not None:
                total["support"] += int((rollout.support >= 0).sum())
                total["support_tokens"] += length
            if rollout.reward is not None:
                total["rewarded"] += 1
                total["reward"] += rollout.reward
                for part, value in rollout.reward_parts.items():
                    total[f"{_PART}{part}"] += value
            if rollout.verdict is not None:
                total[f"verdict_{rollout.verdict}"] += 1
    return list(total.values()), float(longest)


def metrics(total: Mapping[str, float], longest: float) -> dict[str, float]:
    """Metrics from counts summed over ranks and the longest response of all."""
    groups, responses = max(total["groups"], 1.0), max(total["responses"], 1.0)
    values = {
        "rollout/responses": total["responses"],
        "rollout/tokens": total["tokens"],
        "rollout/response_tokens_mean": total["tokens"] / responses,
        "rollout/response_tokens_max": longest,
        "rollout/truncated_frac": total["truncated"] / responses,
    }
    graded = sum(total[f"verdict_{verdict}"] for verdict in Verdict)
    if graded:
        rewarded = max(total["rewarded"], 1.0)
        mixed = total["groups"] - total["groups_all_correct"] - total["groups_all_wrong"]
        values |= {
            "reward/mean": total["reward"] / rewarded,
            "reward/accuracy": total["verdict_correct"] / responses,
            "reward/groups_all_correct_frac": total["groups_all_correct"] / groups,
            "reward/groups_all_wrong_frac": total["groups_all_wrong"] / groups,
            "reward/groups_mixed_frac": mixed / groups,
            **{
                f"reward/verdict_{verdict}_frac": total[f"verdict_{verdict}"] / responses
                for verdict in Verdict
            },
            **{
                f"reward/{name}_mean": value / rewarded
                for name, value in total.items()
                if name.startswith(_PART)
            },
        }
    if total["logprob_tokens"]:
        values["rollout/entropy_estimate"] = -total["logprob"] / total["logprob_tokens"]
    if total["support_tokens"]:
        values["rollout/support_mean"] = total["support"] / total["support_tokens"]
    return values
