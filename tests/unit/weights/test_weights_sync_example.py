"""The worked examples of weights/sync.py, rules.py and pieces.py, as tests."""

from dataclasses import replace

import torch
from weights_models import QWEN2

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.weights.layouts import hf_shapes
from megatron_rl.weights.pieces import Piece, size
from megatron_rl.weights.rules import Qkv
from megatron_rl.weights.sync import _copies, _owned, engine_holders, training_holders

QKV = Qkv(megatron="linear_qkv.weight", hf="{proj}_proj.weight", engine="qkv_proj.weight")
TP4 = EngineLayout(world_size=4, tp=4)


def copies_of(tp_rank):
    """Last words of the Hugging Face name, first row -> the copies it counts in."""
    by_module, num_copies = _copies(engine_holders(QWEN2, TP4), tp_rank)
    found = {
        (piece.hf.removeprefix("model.layers.0."), piece.box[0][0]): copies
        for pieces in by_module.values()
        for piece, copies in pieces
        if piece.hf.startswith("model.layers.0.")
    }
    return found, num_copies


def test_copies_of_two_key_heads_over_four_ranks():
    (zero, num_copies), (one, _), (two, _), (three, _) = (copies_of(rank) for rank in range(4))
    assert num_copies == 4
    for rank, found in enumerate((zero, one, two, three)):
        assert found["self_attn.q_proj.weight", 2 * rank] == (0, 1, 2, 3)
        assert found["input_layernorm.weight", 0] == (rank,)
    key = "self_attn.k_proj.weight"
    assert zero[key, 0] == two[key, 2] == (0, 2)
    assert one[key, 0] == three[key, 2] == (1, 3)


def test_every_copy_is_a_whole_model():
    counted = torch.zeros(4, dtype=torch.int64)
    for rank in range(4):
        by_module, _ = _copies(engine_holders(QWEN2, TP4), rank)
        for pieces in by_module.values():
            for piece, copies in pieces:
                counted[list(copies)] += size(piece.box)
    whole = sum(torch.Size(shape).numel() for shape in hf_shapes(QWEN2).values())
    assert counted.tolist() == [whole] * 4


def test_each_rectangle_of_the_policy_is_counted_once():
    """Also where a tied embedding stands on two stages, and norms on all tensor-parallel ranks."""
    arch = replace(QWEN2, tied_embeddings=True)
    holders = training_holders(arch, Layout(world_size=8, tp=2, pp=2))
    counted = [piece for rank in range(8) for piece in _owned(holders, rank)]
    whole = sum(torch.Size(shape).numel() for shape in hf_shapes(arch).values())
    assert sum(size(piece.box) for piece in counted) == whole
    assert len({(piece.hf, piece.box) for piece in counted}) == len(counted)


def test_rows_of_query_key_and_value():
    def rows(pieces):
        return [(p.index[0], p.hf.partition("_")[0], p.box[0]) for p in pieces]

    second_half = [((0, 4), "q", (4, 8)), ((4, 6), "k", (2, 4)), ((6, 8), "v", (2, 4))]
    assert rows(QKV.megatron_pieces(QWEN2, 2, 1)) == second_half
    assert rows(QKV.engine_pieces(QWEN2, 2, 1)) == second_half
    key_and_value = [("k", (0, 2)), ("v", (0, 2))]
    assert [row[1:] for row in rows(QKV.megatron_pieces(QWEN2, 4, 1))] == key_and_value
    assert [row[1:] for row in rows(QKV.engine_pieces(QWEN2, 4, 1))] == [
        ("q", (2, 4)),
        *key_and_value,
    ]
    assert rows(QKV.megatron_pieces(QWEN2, 4, 0)) == [((0, 4), "q", (0, 4))]


def test_a_piece_says_which_rows_are_which():
    example = Piece("linear_qkv.weight", ((4, 6), (0, 8)), "k_proj.weight", ((2, 4), (0, 8)))
    assert example in list(QKV.megatron_pieces(QWEN2, 2, 1))
