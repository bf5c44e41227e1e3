import pytest
import torch
from weights_models import ARCHS, hf_tensors, write_checkpoint

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.weights.hf_files import HfCheckpoint
from megatron_rl.weights.layouts import engine_pieces, hf_shapes, megatron_pieces
from megatron_rl.weights.pieces import local_shapes, view

SPLITS = [(tp, pp, vpp) for tp in (1, 2, 4) for pp, vpp in ((1, 1), (2, 1), (2, 2), (4, 1))]
MIXTURES = [name for name, arch in ARCHS.items() if arch.mixture is not None]


def of_all_ranks(arch, tp, pp, vpp):
    layout = Layout(world_size=tp * pp, tp=tp, pp=pp, vpp=vpp)
    return of_ranks(arch, layout)


def of_ranks(arch, layout):
    return [
        megatron_pieces(arch, layout, layout.coordinates(rank)) for rank in range(layout.world_size)
    ]


def filled(checkpoint, pieces):
    params = {name: torch.full(s, torch.nan) for name, s in local_shapes(pieces).items()}
    checkpoint.fill(params, pieces)
    return params


def gathered(arch, shards):
    """Hugging Face tensors from all shards; a rectangle that two shards hold must agree."""
    result = {name: torch.full(shape, torch.nan) for name, shape in hf_shapes(arch).items()}
    for pieces, params in shards:
        for piece in pieces:
            place = view(result[piece.hf], piece.box)
            values = piece.of(params)
            assert (place.isnan() | (place == values)).all(), piece
            place.copy_(values)
    return result


@pytest.mark.parametrize(("tp", "pp", "vpp"), SPLITS)
@pytest.mark.parametrize("name", ARCHS)
def test_what_is_loaded_comes_back_bit_for_bit(tmp_path, name, tp, pp, vpp):
    check_round_trip(tmp_path, ARCHS[name], Layout(world_size=tp * pp, tp=tp, pp=pp, vpp=vpp))


@pytest.mark.parametrize(
    ("world", "tp", "pp", "vpp", "ep", "etp"),
    [
        (2, 1, 1, 1, 2, 1),
        (4, 1, 1, 1, 4, 1),
        (4, 1, 1, 1, 2, 2),  # four ranks: each expert over two, two of them
        (4, 2, 1, 1, 2, 2),
        (4, 2, 1, 1, 4, 1),
        (4, 4, 1, 1, 2, 2),
        (4, 1, 2, 1, 2, 1),
        (8, 2, 2, 2, 2, 2),
    ],
)
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_come_back_from_every_way_to_share_them(
    tmp_path, name, world, tp, pp, vpp, ep, etp
):
    layout = Layout(world_size=world, tp=tp, pp=pp, vpp=vpp, ep=ep, expert_tp=etp)
    check_round_trip(tmp_path, ARCHS[name], layout)


def check_round_trip(tmp_path, arch, layout):
    tensors = hf_tensors(arch)
    checkpoint = HfCheckpoint(write_checkpoint(tmp_path, tensors), hf_shapes(arch))
    shards = [(p, filled(checkpoint, p)) for p in of_ranks(arch, layout)]
    for _, params in shards:
        assert not any(param.isnan().any() for param in params.values())
    back = gathered(arch, shards)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ARCHS)
def test_an_engines_shards_hold_the_whole_model(tmp_path, name, tp):
    arch = ARCHS[name]
    tensors = hf_tensors(arch)
    checkpoint = HfCheckpoint(write_checkpoint(tmp_path, tensors), hf_shapes(arch))
    layout = EngineLayout(world_size=tp, tp=tp)
    shards = [
        (pieces, filled(checkpoint, pieces))
        for pieces in (engine_pieces(arch, layout, rank) for rank in range(tp))
    ]
    back = gathered(arch, shards)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_interleaved_chunks_take_turns():
    """Four layers on two stages of two chunks: layers 0 and 2, and layers 1 and 3."""
    layers = [
        [(piece.param, piece.hf) for piece in pieces if piece.hf.endswith("input_layernorm.weight")]
        for pieces in of_all_ranks(ARCHS["llama"], 1, 2, 2)
    ]
    local = "decoder.layers.0.input_layernorm.weight"
    assert layers == [
        [
            (f"chunk0.{local}", "model.layers.0.input_layernorm.weight"),
            (f"chunk1.{local}", "model.layers.2.input_layernorm.weight"),
        ],
        [
            (f"chunk0.{local}", "model.layers.1.input_layernorm.weight"),
            (f"chunk1.{local}", "model.layers.3.input_layernorm.weight"),
        ],
    ]


@pytest.mark.parametrize(("pp", "vpp", "copies"), [(1, 1, 1), (2, 1, 2), (2, 2, 2)])
def test_the_last_stage_has_its_own_copy_of_a_tied_embedding(pp, vpp, copies):
    ranks = of_all_ranks(ARCHS["qwen2_tied"], 1, pp, vpp)
    holders = [p.param for pieces in ranks for p in pieces if p.hf == "model.embed_tokens.weight"]
    assert len(holders) == copies
    assert holders[0].endswith("embedding.word_embeddings.weight")
    if copies > 1:
        assert holders[1].endswith("output_layer.weight")
        assert any(p.param == holders[1] for p in ranks[-1])
