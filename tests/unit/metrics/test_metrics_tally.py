import pytest
import torch

from megatron_rl.metrics import tally
from megatron_rl.types import Prompt, Rollout, RolloutGroup, Verdict


def rollout(verdict, length, *, reward, finish="stop", logprob=-0.5, **parts):
    return Rollout(
        response_tokens=torch.ones(length, dtype=torch.int64),
        rollout_logprobs=torch.full((length,), logprob),
        finish_reason=finish,
        policy_version=0,
        reward=reward,
        verdict=verdict,
        reward_parts=parts,
    )


def group(*rollouts):
    prompt = Prompt(group_id=0, tokens=torch.tensor([1]), answer="")
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


GROUPS = [
    group(rollout(Verdict.CORRECT, 2, reward=1.0), rollout(Verdict.CORRECT, 4, reward=1.0)),
    group(
        rollout(Verdict.CORRECT, 3, reward=1.0),
        rollout(Verdict.NO_ANSWER, 7, reward=-1.0, finish="length", logprob=-1.0),
    ),
    group(rollout(Verdict.WRONG, 1, reward=-1.0), rollout(Verdict.TIMEOUT, 3, reward=None)),
]


def measured(shares, parts=()):
    counted = [tally.count(share, parts) for share in shares]
    total = [sum(column) for column in zip(*(counts for counts, _ in counted), strict=True)]
    longest = max(longest for _, longest in counted)
    return tally.metrics(dict(zip(tally.names(parts), total, strict=True)), longest)


def test_metrics_match_hand_counts():
    values = measured([GROUPS])
    expected = {
        "rollout/responses": 6,
        "rollout/tokens": 20,
        "rollout/response_tokens_mean": 20 / 6,
        "rollout/response_tokens_max": 7,
        "rollout/truncated_frac": 1 / 6,
        "reward/mean": (3 - 2) / 5,  # the response whose grading failed has no reward
        "reward/accuracy": 3 / 6,
        "reward/groups_all_correct_frac": 1 / 3,
        "reward/groups_all_wrong_frac": 1 / 3,
        "reward/groups_mixed_frac": 1 / 3,
        "reward/verdict_correct_frac": 3 / 6,
        "reward/verdict_wrong_frac": 1 / 6,
        "reward/verdict_no_answer_frac": 1 / 6,
        "reward/verdict_timeout_frac": 1 / 6,
        "reward/verdict_error_frac": 0,
        "rollout/entropy_estimate": (13 * 0.5 + 7 * 1.0) / 20,
    }
    assert values == pytest.approx(expected)


def test_any_split_over_ranks_gives_the_same():
    assert measured([GROUPS[:1], [], GROUPS[1:]]) == pytest.approx(measured([GROUPS]))


def test_parts_of_the_reward_are_averaged_over_all_responses():
    groups = [
        group(
            rollout(Verdict.CORRECT, 2, reward=1.5, format=1.0, brevity=-0.5),
            rollout(Verdict.WRONG, 2, reward=-1.0, format=0.0, brevity=-0.25),
        ),
        group(rollout(Verdict.WRONG, 2, reward=-0.5, format=1.0, brevity=0.0)),
    ]
    values = measured([groups[:1], groups[1:]], ("brevity", "format"))
    assert values["reward/part_format_mean"] == pytest.approx(2 / 3)
    assert values["reward/part_brevity_mean"] == pytest.approx(-0.25)


def test_gold_responses_have_no_reward_metrics():
    gold = Rollout(
        response_tokens=torch.ones(3, dtype=torch.int64),
        rollout_logprobs=None,
        finish_reason="gold",
        policy_version=0,
    )
    assert not [name for name in measured([[group(gold)]]) if name.startswith("reward/")]
