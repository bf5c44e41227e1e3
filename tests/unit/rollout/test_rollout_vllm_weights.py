import torch

from megatron_rl.rollout.vllm_weights import VllmWeights
from megatron_rl.weights.pieces import Piece


class Packed(torch.nn.Module):
    """What vLLM's CPU build leaves of a bfloat16 linear: no weight, and a bias in float32."""

    def __init__(self):
        super().__init__()
        self.cpu_linear = object()
        self.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
        self.bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.float32))


def test_packed_modules_are_staged_in_the_loaders_dtype_and_shape():
    model = torch.nn.Module()
    model.qkv = Packed()
    model.norm = torch.nn.LayerNorm(4, dtype=torch.bfloat16)
    pieces = [
        Piece("qkv.weight", ((0, 4), (0, 3)), "q", ((0, 4), (0, 3))),
        Piece("qkv.bias", ((0, 4),), "b", ((0, 4),)),
        Piece("norm.weight", ((0, 4),), "n", ((0, 4),)),
    ]
    weights = VllmWeights(model, None, pieces, torch.bfloat16)
    assert (weights["qkv.weight"].shape, weights["qkv.weight"].dtype) == ((4, 3), torch.bfloat16)
    # In the live float32 the checksum would see other bits than the policy's bfloat16.
    assert weights["qkv.bias"].dtype == torch.bfloat16
    # What is not packed is written in place.
    assert weights["norm.weight"].data_ptr() == model.norm.weight.data_ptr()
