import pytest
import torch

from megatron_rl.algorithms.gae import adapted_kl_coef, gae, token_rewards


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_reward_is_on_the_last_token_and_kl_on_all():
    old = tensor([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]])
    ref = tensor([[-1.5, -2.0, -2.0], [-0.25, 0.0, 0.0]])
    rewards = token_rewards(
        tensor([1.0, -1.0]),
        torch.tensor([3, 1]),
        old_logprobs=old,
        ref_logprobs=ref,
        kl_coef=0.1,
    )
    assert rewards.tolist() == [
        pytest.approx([-0.05, 0.0, 1.0 + 0.1]),
        pytest.approx([-1.0 + 0.025, 0.0, 0.0]),
    ]


def test_without_a_kl_no_logprobs_are_needed():
    rewards = token_rewards(
        tensor([2.0]), torch.tensor([2]), old_logprobs=None, ref_logprobs=None, kl_coef=0.0
    )
    assert rewards.tolist() == [[0.0, 2.0]]


def test_advantages_match_hand_calculation():
    # gamma 1/2, lambda 1/2. Errors from the end: 1 - 0.5 = 0.5; 0 + 0.25 - 1 = -0.75;
    # 0 + 0.5 - 0.25 = 0.25. Advantages: 0.5; -0.75 + 0.125 = -0.625; 0.25 - 0.15625 = 0.09375.
    advantages, returns = gae(
        tensor([[0.0, 0.0, 1.0]]), tensor([[0.25, 1.0, 0.5]]), gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [[0.09375, -0.625, 0.5]]
    assert returns.tolist() == [[0.34375, 0.375, 1.0]]


def test_lambda_one_is_the_return_less_the_value_and_zero_one_step():
    rewards, values = tensor([[0.5, 0.0, 1.0]]), tensor([[0.1, 0.2, 0.3]])
    advantages, returns = gae(rewards, values, gamma=1.0, lam=1.0)
    assert returns[0].tolist() == pytest.approx([1.5, 1.0, 1.0])
    advantages, _ = gae(rewards, values, gamma=1.0, lam=0.0)
    assert advantages[0].tolist() == pytest.approx([0.6, 0.1, 0.7])


def test_padding_changes_nothing():
    rewards, values = tensor([[0.0, 1.0]]), tensor([[0.4, 0.7]])
    alone, _ = gae(rewards, values, gamma=0.9, lam=0.8)
    padded = gae(
        torch.cat([torch.nn.functional.pad(rewards, (0, 3)), torch.randn(1, 5).double()]),
        torch.cat([torch.nn.functional.pad(values, (0, 3)), torch.randn(1, 5).double()]),
        gamma=0.9,
        lam=0.8,
    )[0]
    assert padded[0].tolist() == [*alone[0].tolist(), 0.0, 0.0, 0.0]


def test_no_responses_and_no_tokens():
    empty = token_rewards(
        torch.empty(0).double(),
        torch.empty(0, dtype=torch.int64),
        old_logprobs=None,
        ref_logprobs=None,
        kl_coef=0.0,
    )
    assert [part.shape for part in gae(empty, empty, gamma=1.0, lam=1.0)] == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 500 / 10_000)),
        (60.0, 0.1 * (1 + 0.2 * 500 / 10_000)),  # an error over 20 % counts as 20 %
        (0.0, 0.1 * (1 - 0.2 * 500 / 10_000)),
    ],
)
def test_the_kl_coefficient_follows_the_target(kl, expected):
    found = adapted_kl_coef(0.1, kl=kl, target=6.0, responses=500, horizon=10_000)
    assert found == pytest.approx(expected, rel=1e-14)
