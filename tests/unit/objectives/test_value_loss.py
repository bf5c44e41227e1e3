import pytest
import torch

from megatron_rl.objectives.value import value_loss, value_metrics


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


OLD = tensor(0.0, 0.0, 1.0)
RETURNS = tensor(1.0, -1.0, 1.0)
VALUES = tensor(0.9, 0.5, 1.2)


def test_without_a_clip_it_is_half_the_squared_error():
    result = value_loss(VALUES, old_values=OLD, returns=RETURNS, weight=1 / 3, clip=None)
    assert result.loss.item() == pytest.approx((0.01 + 2.25 + 0.04) / 6, rel=1e-14)


def test_a_move_beyond_the_clip_earns_nothing_and_a_wrong_move_costs_in_full():
    # 0.9 counts as 0.5: (0.5 - 1)^2; 0.5 is at the bound; 1.2 is within it
    values = VALUES.clone().requires_grad_()
    result = value_loss(values, old_values=OLD, returns=RETURNS, weight=1 / 3, clip=0.5)
    result.loss.backward()
    assert result.loss.item() == pytest.approx((0.25 + 2.25 + 0.04) / 6, rel=1e-14)
    assert values.grad.tolist() == pytest.approx([0.0, 1.5 / 3, 0.2 / 3])


def test_metrics_are_means_over_tokens():
    result = value_loss(VALUES, old_values=OLD, returns=RETURNS, weight=1 / 3, clip=0.5)
    metrics = value_metrics(result.sums)
    # errors 1, -1, 0: variance 2/3; returns 1, -1, 1: mean 1/3, variance 8/9
    assert metrics == {
        "critic/loss": pytest.approx((0.25 + 2.25 + 0.04) / 6),
        "critic/clip_frac": pytest.approx(1 / 3),
        "critic/value_mean": pytest.approx(1 / 3),
        "critic/return_mean": pytest.approx(1 / 3),
        "critic/explained_variance": pytest.approx(1 - (2 / 3) / (8 / 9)),
    }


def test_equal_returns_have_no_variance_to_explain():
    result = value_loss(tensor(0.5), old_values=tensor(0.5), returns=tensor(1.0), weight=1, clip=1)
    assert "critic/explained_variance" not in value_metrics(result.sums)


def test_no_tokens():
    empty = torch.empty(0, dtype=torch.float64, requires_grad=True)
    result = value_loss(empty, old_values=empty, returns=empty, weight=1.0, clip=0.5)
    result.loss.backward()
    assert result.loss.item() == 0
    assert value_metrics(result.sums) == {}
