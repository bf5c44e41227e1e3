import pytest
import torch
from weights_models import ARCHS, hf_tensors

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.weights.checksum import checksum
from megatron_rl.weights.layouts import engine_pieces, hf_shapes, megatron_pieces
from megatron_rl.weights.pieces import view, whole

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ARCH = ARCHS["qwen2"]


def of(tensor):
    return checksum(tensor, whole(tuple(tensor.shape))).item()


def totals(tensors, shards):
    """Per Hugging Face tensor over all shards, each rectangle once, in an order of their own."""
    counted = set()
    result = dict.fromkeys(tensors, 0)
    for piece in reversed([piece for pieces in shards for piece in pieces]):
        if (piece.hf, piece.box) not in counted:
            counted.add((piece.hf, piece.box))
            result[piece.hf] += checksum(view(tensors[piece.hf], piece.box), piece.box).item()
    return {name: (total + 2**63) % 2**64 - 2**63 for name, total in result.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 2), (2, 2, 1), (4, 2, 2)]
)
def test_every_training_layout_has_the_same_totals(dtype, tp, pp, vpp):
    tensors = hf_tensors(ARCH, dtype)
    layout = Layout(world_size=tp * pp, tp=tp, pp=pp, vpp=vpp)
    shards = [megatron_pieces(ARCH, layout, layout.coordinates(r)) for r in range(tp * pp)]
    assert totals(tensors, shards) == {name: of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("world", "ep", "etp"), [(2, 2, 1), (4, 2, 2), (4, 4, 1)])
def test_experts_have_the_same_totals_however_they_are_shared(world, ep, etp):
    arch = ARCHS["qwen3_moe"]
    tensors = hf_tensors(arch)
    layout = Layout(world_size=world, tp=1, pp=1, ep=ep, expert_tp=etp)
    shards = [megatron_pieces(arch, layout, layout.coordinates(rank)) for rank in range(world)]
    assert totals(tensors, shards) == {name: of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_engine_layout_has_the_same_totals(tp, name):
    arch = ARCHS[name]
    tensors = hf_tensors(arch)
    layout = EngineLayout(world_size=tp, tp=tp)
    shards = [engine_pieces(arch, layout, rank) for rank in range(tp)]
    assert totals(tensors, shards) == {name: of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_shows(dtype):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tensor = torch.randn(5, 7).to(dtype)
    before = of(tensor)
    for bit in range(8 * dtype.itemsize):
        flipped = tensor.clone()
        mask = 1 << bit
        if bit == 8 * dtype.itemsize - 1:
            mask -= 1 << (bit + 1)  # the sign, as a signed integer
        flipped.view(integers)[3, 4] ^= mask
        assert of(flipped) != before, bit


def swapped(tensor, dim, a, b):
    order = torch.arange(tensor.shape[dim])
    order[torch.tensor([*a, *b])] = order[torch.tensor([*b, *a])]
    return tensor.index_select(dim, order)


@pytest.mark.parametrize(
    ("name", "dim", "a", "b"),
    [
        ("model.embed_tokens.weight", 0, [3], [4]),  # rows
        ("model.layers.1.self_attn.q_proj.weight", 0, [0, 1], [2, 3]),  # heads
        ("model.layers.1.self_attn.k_proj.bias", 0, [0, 1], [2, 3]),
        ("model.layers.1.mlp.down_proj.weight", 1, [0], [11]),  # columns
        ("model.layers.1.mlp.up_proj.weight", 0, range(6), range(6, 12)),  # ranks of TP2
        ("model.layers.1.self_attn.o_proj.weight", 1, range(4), range(4, 8)),
        ("model.norm.weight", 0, [0], [7]),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stands_in_the_wrong_place_shows(dtype, name, dim, a, b):
    tensor = hf_tensors(ARCH, dtype)[name]
    wrong = swapped(tensor, dim, a, b)
    assert not torch.equal(wrong, tensor)
    assert of(wrong) != of(tensor)


def test_transposition_and_one_tensor_for_another_show():
    """Square tensors and equal shapes are what a mistaken name would give."""
    tensors = hf_tensors(ARCH)
    square = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert square.shape[0] == square.shape[1]
    assert of(square.T.contiguous()) != of(square)
    by_shape = {}
    for name, tensor in tensors.items():
        by_shape.setdefault(tuple(tensor.shape), []).append((name, of(tensor)))
    for shape, found in by_shape.items():
        assert len({total for _, total in found}) == len(found), shape
    assert set(tensors) == set(hf_shapes(ARCH))
