"""What a user's function may return, of NumPy and torch as well, and what a worker makes of it."""

from fractions import Fraction

import numpy
import pytest
import torch

from megatron_rl.reward import worker


@pytest.mark.parametrize(
    ("value", "reply"),
    [
        (True, {"verdict": "correct"}),
        (numpy.bool_(True), {"verdict": "correct"}),
        (numpy.bool_(False), {"verdict": "wrong"}),
        (numpy.array(5) > 4, {"verdict": "correct"}),
        (torch.tensor(True), {"verdict": "correct"}),
        (2, {"reward": 2.0}),
        (Fraction(1, 4), {"reward": 0.25}),
        (numpy.float16(0.5), {"reward": 0.5}),
        (numpy.float32(0.5), {"reward": 0.5}),
        (numpy.float64(0.5), {"reward": 0.5}),
        (numpy.longdouble(0.5), {"reward": 0.5}),
        (numpy.int8(-1), {"reward": -1.0}),
        (numpy.uint64(3), {"reward": 3.0}),
        (numpy.array(0.5), {"reward": 0.5}),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), {"reward": 0.5}),
    ],
)
def test_numbers_of_every_library_are_rewards(value, reply):
    found = worker._describe_value(value)
    assert found == reply
    assert {type(each) for each in found.values()} <= {str, float}  # what JSON can carry


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (numpy.array([True, False]), "returned a numpy.ndarray: must be a bool or a float"),
        (numpy.array([1.0]), "returned a numpy.ndarray: must be a bool or a float"),
        (torch.ones(2), "returned a torch.Tensor: must be a bool or a float"),
        (numpy.str_("1"), "returned a numpy.str_: must be a bool or a float"),
        (numpy.complex64(1), "returned a numpy.complex64: must be a bool or a float"),
        (numpy.datetime64("2024-01-01"), "returned a numpy.datetime64: must be a bool or a float"),
        (numpy.float32("nan"), "returned nan: must be finite"),
        (torch.tensor(float("inf")), "returned inf: must be finite"),
        (numpy.float64(1e300), "at most 1e+09 in size"),
        (Fraction(10**400), "returned inf: must be finite"),
        (numpy, "returned a module: must be a bool or a float"),
    ],
)
def test_what_no_library_calls_a_number_is_no_reward(value, reason):
    found = worker._describe_value(value)
    assert (found["verdict"], found["is_misuse"]) == ("error", True)
    assert reason in found["reason"]
