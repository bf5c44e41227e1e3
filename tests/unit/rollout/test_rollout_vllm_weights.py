import pytest
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
    model.norm = torch.nn.RMSNorm(4, dtype=torch.bfloat16)
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


class Experts(torch.nn.Module):
    """Two experts as vLLM stacks them, after its CPU kernel padded their 2 rows to 8."""

    def __init__(self):
        super().__init__()
        self.quant_method = self
        self.moe_kernel = self.fused_experts = self
        self.w13_weight = torch.nn.Parameter(torch.zeros(2, 16, 3))
        self.seen: list[torch.Tensor] = []

    def process_weights_after_loading(self, layer):
        self.seen.append(layer.w13_weight.data.clone())
        padded = torch.zeros(2, 16, 3)
        padded[:, :4] = layer.w13_weight.data[:, :4]
        layer.w13_weight = torch.nn.Parameter(padded)


def test_experts_are_staged_as_the_loader_has_them_and_packed_again():
    model = torch.nn.Module()
    model.experts = Experts()
    model.model = torch.nn.Module()
    pieces = [
        Piece("experts.w13_weight", ((at, at + 2), (0, 3)), f"{e}.{at}", ((0, 2), (0, 3)), (e,))
        for e in range(2)
        for at in (0, 2)
    ]
    weights = VllmWeights(model, None, pieces, torch.float32)
    live = model.experts.w13_weight
    for number, piece in enumerate(pieces):
        assert piece.of(weights).shape == (2, 3)
        piece.of(weights).fill_(number)
    weights.commit(["experts"])
    loaded, repacked = model.experts.seen  # the method's own step, and the kernel's
    assert loaded.shape == (2, 4, 3)
    assert loaded[:, ::2, 0].tolist() == [[0, 1], [2, 3]]
    assert repacked.shape == (2, 16, 3)
    assert model.experts.w13_weight is live, "CUDA graphs hold its address"
    assert live[:, [0, 2, 4], 0].tolist() == [[0, 1, 0], [2, 3, 0]]


class Latent(torch.nn.Module):
    """Latent attention in a dtype of its own, so that what it makes of a weight is a copy."""

    def __init__(self, source):
        super().__init__()
        self.kv_b_proj = source
        self.W_UV = torch.nn.Parameter(torch.empty(2, 3))
        self.W_UK_T = torch.nn.Parameter(torch.empty(2, 3))
        self.process_weights_after_loading(torch.float64)

    def process_weights_after_loading(self, dtype):
        upper, lower = self.kv_b_proj.weight.data.to(dtype).split(2)
        self.W_UV.data, self.W_UK_T.data = upper, lower


def test_latent_attention_makes_its_own_anew_when_the_weight_has_arrived():
    model = torch.nn.Module()
    model.raised = torch.nn.Linear(3, 4, bias=False)
    model.attention = Latent(model.raised)
    model.model = torch.nn.Module()
    pieces = [Piece("raised.weight", ((0, 4), (0, 3)), "r", ((0, 4), (0, 3)))]
    weights = VllmWeights(model, None, pieces, torch.float64)
    weights["raised.weight"].fill_(7.0)
    assert not (model.attention.W_UV == 7).any()
    weights.commit(["raised"])
    assert (model.attention.W_UV == 7).all()
    assert (model.attention.W_UK_T == 7).all()


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("norm.weight", "norm.gain"), r"no parameters \['norm.gain'\]"),
        ((), r"none for \['norm.weight'\]"),
    ],
)
def test_an_engine_of_other_parameters_is_refused(names, reason):
    model = torch.nn.Module()
    model.norm = torch.nn.RMSNorm(4)
    pieces = [Piece(name, ((0, 4),), "n", ((0, 4),)) for name in names]
    with pytest.raises(RuntimeError, match=reason):
        VllmWeights(model, None, pieces, torch.float32)
