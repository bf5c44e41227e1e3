"""A weight that is not finite is named by its place in the Hugging Face tensor."""

import pytest
import torch

from megatron_rl.weights.finite import first_not_finite
from megatron_rl.weights.pieces import Piece

# Rows 2 to 4 of `gate` [8, 5] are rows 1 to 3 of a parameter, and `up` [2] stands in an expert's.
PIECES = [
    Piece("fc1", ((1, 4), (0, 5)), "gate", ((2, 5), (0, 5))),
    Piece("experts", ((0, 2),), "up", ((4, 6),), stack=(1,)),
]


def params(dtype):
    return {"fc1": torch.ones(6, 5, dtype=dtype), "experts": torch.ones(3, 2, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_element_is_named(dtype, value):
    weights = params(dtype)
    assert first_not_finite(weights, PIECES) is None
    weights["fc1"][2, 4] = weights["fc1"][3, 0] = value
    assert first_not_finite(weights, PIECES) == f"gate[3, 4] is {value}"


def test_an_element_of_one_expert_is_named():
    weights = params(torch.float32)
    weights["experts"][1, 1] = torch.nan
    assert first_not_finite(weights, PIECES) == "up[5] is nan"


def test_what_no_piece_holds_does_not_matter():
    weights = params(torch.float32)
    weights["fc1"][0, 0] = weights["fc1"][5, 0] = weights["experts"][0, 0] = torch.nan
    assert first_not_finite(weights, PIECES) is None


def test_large_weights_are_finite():
    weights = {name: tensor * 3e38 for name, tensor in params(torch.float32).items()}
    assert first_not_finite(weights, PIECES) is None
