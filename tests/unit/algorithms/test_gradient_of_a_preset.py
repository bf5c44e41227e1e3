"""The gradient of a whole step, against the paper's formulas and against costlier ways to it."""

import math

import pytest
import torch
from rollout_groups import make_group

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.objectives.token_loss import token_loss
from megatron_rl.types import LossTokens

MAX_RESPONSE_TOKENS = 12
GROUPS = [
    make_group(0, [1.0, -1.0, -1.0], lengths=[3, 5, 2]),
    make_group(1, [1.0, 1.0], lengths=[4, 1]),
    make_group(2, [-1.0, -1.0, -1.0, -1.0], lengths=[2, 2, 6, 3]),
    make_group(3, [-1.0, 1.0, 1.0], lengths=[7, 2, 9]),
]
RESPONSES = [
    (group.prompt.group_id, index, len(rollout.response_tokens), rollout.reward)
    for group in GROUPS
    for index, rollout in enumerate(group.rollouts)
]


def step_gradient(**settings):
    """d loss / d logprobs of every response, {(group_id, index): [R]}, 0 for those left out."""
    algorithm = Algorithm(AlgorithmConfig(**settings))
    selection = algorithm.select(GROUPS, update_of=dict.fromkeys(range(4), 0), seed=(0,))
    logprobs, old_logprobs = all_logprobs()
    for sample in algorithm.assign_advantages(selection.samples, sum_over_ranks=lambda x: x):
        key = (sample.group_id, sample.index)
        length = len(sample.response_tokens)
        weight = algorithm.token_weight(sample, selection.totals[0], MAX_RESPONSE_TOKENS)
        tokens = LossTokens(
            at=torch.arange(length),
            targets=sample.response_tokens,
            old_logprobs=old_logprobs[key],
            advantages=torch.full((length,), sample.advantage, dtype=torch.float64),
            weights=torch.full((length,), weight, dtype=torch.float64),
        )
        config = algorithm.config
        result = token_loss(logprobs[key], None, tokens, config.objective, config.shared_terms)
        result.loss.backward()
    return {
        key: torch.zeros_like(value) if value.grad is None else value.grad
        for key, value in logprobs.items()
    }


def paper_gradient(advantage_of, *, is_clipped, weight_of):
    """Of 1/N sum_i sum_t w_i min(s A, clip(s) A), or of log pi A, by differentiating by hand."""
    logprobs, old_logprobs = all_logprobs()
    gradients = {}
    for group_id, index, length, _ in RESPONSES:
        advantage, weight = advantage_of(group_id, index), weight_of(length)
        values = []
        for t in range(length):
            current = logprobs[group_id, index][t].item()
            s = math.exp(current - old_logprobs[group_id, index][t].item())
            clipped_is_less = min(max(s, 0.8), 1.2) * advantage < s * advantage
            if not is_clipped:
                s = 1.0
            values.append(0.0 if is_clipped and clipped_is_less else -advantage * s * weight)
        gradients[group_id, index] = torch.tensor(values, dtype=torch.float64)
    return gradients


def all_logprobs():
    generator = torch.Generator().manual_seed(0)
    current, old = {}, {}
    for group_id, index, length, _ in RESPONSES:
        old[group_id, index] = -torch.rand(length, generator=generator, dtype=torch.float64)
        step = 0.3 * torch.randn(length, generator=generator, dtype=torch.float64)
        current[group_id, index] = (old[group_id, index] + step).requires_grad_()
    return current, old


def rewards_of(group_id):
    return [rollout.reward for rollout in GROUPS[group_id].rollouts]


def reward(group_id, index):
    return rewards_of(group_id)[index]


def centered(group_id, index):
    return reward(group_id, index) - sum(rewards_of(group_id)) / len(rewards_of(group_id))


def sample_std(group_id):
    squares = sum(centered(group_id, i) ** 2 for i in range(len(rewards_of(group_id))))
    return math.sqrt(squares / (len(rewards_of(group_id)) - 1))


def is_mixed(group_id):
    return len(set(rewards_of(group_id))) == 2


def is_positive(group_id, index):
    return float(reward(group_id, index) > 0)


PAPER = {  # advantage (0: rejected), number kept
    "raft": (is_positive, 5),
    "raft_pp": (is_positive, 5),
    "reinforce": (reward, 12),
    "reinforce_remove_all_wrong": (lambda g, i: reward(g, i) * (g != 2), 8),
    "reinforce_remove_all_correct": (lambda g, i: reward(g, i) * (g != 1), 10),
    "reinforce_rej": (lambda g, i: reward(g, i) * is_mixed(g), 6),
    "reinforce_rej_norm": (
        lambda g, i: reward(g, i) / (sample_std(g) + 1e-6) if is_mixed(g) else 0.0,
        6,
    ),
    "reinforce_mean_zero": (centered, 12),
    "grpo": (lambda g, i: centered(g, i) / (sample_std(g) + 1e-6), 12),
    "rloo": (
        lambda g, i: reward(g, i) - (sum(rewards_of(g)) - reward(g, i)) / (len(rewards_of(g)) - 1),
        12,
    ),
    "dr_grpo": (centered, 12),
}


@pytest.mark.parametrize("preset", PAPER)
def test_gradient_is_the_papers(preset):
    advantage_of, num_kept = PAPER[preset]
    expected = paper_gradient(
        advantage_of,
        is_clipped=preset != "raft",
        weight_of=lambda length: (
            1 / (num_kept * (MAX_RESPONSE_TOKENS if preset == "dr_grpo" else length))
        ),
    )
    assert_same(step_gradient(preset=preset), expected)


@pytest.mark.parametrize("preset", PAPER)
@pytest.mark.parametrize("normalize_over", ["kept", "collected"])
@pytest.mark.parametrize("loss_aggregation", ["sequence_mean", "token_mean", "sequence_sum"])
def test_dropping_what_has_no_advantage_leaves_the_gradient(
    preset, normalize_over, loss_aggregation
):
    settings = {
        "preset": preset,
        "normalize_over": normalize_over,
        "loss_aggregation": loss_aggregation,
    }
    dropped = step_gradient(**settings)
    assert_same(step_gradient(**settings, drop_zero_advantage=False), dropped)
    assert_same(step_gradient(**settings, train_on_everything=True), dropped)


def test_collected_shrinks_the_step_by_the_kept_share():
    kept = step_gradient(preset="raft_pp")
    collected = step_gradient(preset="raft_pp", normalize_over="collected")
    assert_same(collected, {key: value * 5 / 12 for key, value in kept.items()})


def test_rejected_tokens_have_exactly_no_gradient():
    gradients = step_gradient(preset="reinforce_rej", train_on_everything=True)
    for group_id, index, _, _ in RESPONSES:
        if not is_mixed(group_id):
            assert (gradients[group_id, index] == 0).all()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, atol=1e-15, rtol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
