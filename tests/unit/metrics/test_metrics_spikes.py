import math

import pytest

from megatron_rl.metrics.spikes import LEAST_ITERATIONS, Spikes


def said(name, usual, *later):
    spikes = Spikes()
    for value in usual:
        assert list(spikes.of({name: value})) == []
    return [list(spikes.of({name: value})) for value in later]


NORMS = [1.0, 1.2, 0.9, 1.1, 1.0, 1.3, 0.8, 1.0, 1.1, 0.9]
LOSSES = [-0.01, 0.02, 0.0, 0.01, -0.02, 0.01, 0.0, -0.01, 0.02, 0.01]


def test_a_norm_far_above_the_median_is_said():
    assert said("policy/grad_norm", NORMS, 5.0, 15.0) == [
        [],
        ["spike: policy/grad_norm is 15, where 1 is usual"],
    ]


@pytest.mark.parametrize("value", [0.5, -0.5])
def test_a_loss_far_from_the_median_is_said_on_either_side(value):
    (line,) = said("policy/loss", LOSSES, value)[0]
    assert line == f"spike: policy/loss is {value:g}, where 0.005 is usual"


def test_nothing_is_said_before_anything_is_usual():
    assert said("policy/grad_norm", NORMS[: LEAST_ITERATIONS - 1], 1000.0) == [[]]


def test_one_spike_does_not_move_the_median_and_a_new_level_does():
    found = said("policy/grad_norm", NORMS, *[50.0] * 12)
    assert [len(lines) for lines in found] == [1] * 10 + [0, 0]


def test_numbers_that_are_not_there_or_not_finite_are_passed_over():
    spikes = Spikes()
    for _ in range(20):
        assert list(spikes.of({"policy/loss": math.nan, "reward/mean": 1.0})) == []
