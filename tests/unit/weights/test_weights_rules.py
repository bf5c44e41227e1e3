import pytest
from weights_models import ARCHS, QWEN2

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.weights.arch import padded_vocab_size
from megatron_rl.weights.families.rows import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    QKV_BIAS,
    STACKED_ATTENTION,
    STACKED_DENSE,
)
from megatron_rl.weights.layouts import check_filled, engine_pieces, megatron_pieces
from megatron_rl.weights.pieces import local_shapes
from megatron_rl.weights.rules import Copy, GateUp, Qkv, Stacked

PHI3 = ARCHS["phi3"]
LAYER = (*ATTENTION, *DENSE)
QKV = next(rule for rule in LAYER if isinstance(rule, Qkv))
GATE_UP = next(rule for rule in LAYER if isinstance(rule, GateUp))
ROW_PARALLEL = [rule for rule in LAYER if isinstance(rule, Copy) and rule.axis == 1]


def rows_of(pieces):
    """(row of the parameter, last part of the Hugging Face name, its first row, its end)."""
    return [
        (
            piece.index[0][0],
            piece.hf.split(".")[-2].removesuffix("_proj"),
            *piece.box[0],
        )
        for piece in pieces
    ]


# Megatron's rows of one group: 2 query heads (4 rows), one key head (2), one value head (2).
@pytest.mark.parametrize(
    ("tp", "tp_rank", "expected"),
    [
        (
            1,
            0,
            [
                (0, "q", 0, 4),
                (4, "k", 0, 2),
                (6, "v", 0, 2),
                (8, "q", 4, 8),
                (12, "k", 2, 4),
                (14, "v", 2, 4),
            ],
        ),
        (2, 0, [(0, "q", 0, 4), (4, "k", 0, 2), (6, "v", 0, 2)]),
        (2, 1, [(0, "q", 4, 8), (4, "k", 2, 4), (6, "v", 2, 4)]),
        # Four ranks over two groups: the run of rows is cut wherever it falls.
        (4, 0, [(0, "q", 0, 4)]),
        (4, 1, [(0, "k", 0, 2), (2, "v", 0, 2)]),
        (4, 2, [(0, "q", 4, 8)]),
        (4, 3, [(0, "k", 2, 4), (2, "v", 2, 4)]),
        # Eight: inside a head.
        (8, 1, [(0, "q", 2, 4)]),
        (8, 2, [(0, "k", 0, 2)]),
    ],
)
@pytest.mark.parametrize("rule", [QKV, QKV_BIAS], ids=["weight", "bias"])
def test_megatrons_qkv_goes_group_by_group(rule, tp, tp_rank, expected):
    assert rows_of(rule.megatron_pieces(QWEN2, tp, tp_rank)) == expected


@pytest.mark.parametrize(
    ("tp", "tp_rank", "expected"),
    [
        (1, 0, [(0, "q", 0, 8), (8, "k", 0, 4), (12, "v", 0, 4)]),
        (2, 1, [(0, "q", 4, 8), (4, "k", 2, 4), (6, "v", 2, 4)]),
        # One query head each; ranks 0 and 1 share key head 0, ranks 2 and 3 share key head 1.
        (4, 0, [(0, "q", 0, 2), (2, "k", 0, 2), (4, "v", 0, 2)]),
        (4, 1, [(0, "q", 2, 4), (2, "k", 0, 2), (4, "v", 0, 2)]),
        (4, 3, [(0, "q", 6, 8), (2, "k", 2, 4), (4, "v", 2, 4)]),
    ],
)
def test_the_engines_qkv_goes_by_kind_and_repeats_key_heads(tp, tp_rank, expected):
    assert rows_of(QKV.engine_pieces(QWEN2, tp, tp_rank)) == expected


@pytest.mark.parametrize("side", ["megatron_pieces", "engine_pieces"])
@pytest.mark.parametrize(
    ("tp", "tp_rank", "expected"),
    [
        (1, 0, [(0, "gate", 0, 12), (12, "up", 0, 12)]),
        (2, 1, [(0, "gate", 6, 12), (6, "up", 6, 12)]),
        (4, 2, [(0, "gate", 6, 9), (3, "up", 6, 9)]),
    ],
)
def test_gate_and_up_are_cut_each_by_itself(side, tp, tp_rank, expected):
    assert rows_of(getattr(GATE_UP, side)(QWEN2, tp, tp_rank)) == expected


@pytest.mark.parametrize("side", ["megatron_pieces", "engine_pieces"])
@pytest.mark.parametrize(
    ("tp", "tp_rank", "expected"),
    [
        (1, 0, [(0, "embed_tokens", 0, 90)]),
        (2, 0, [(0, "embed_tokens", 0, 64)]),
        (2, 1, [(0, "embed_tokens", 64, 90)]),  # 38 rows of padding
        (4, 2, [(0, "embed_tokens", 64, 90)]),  # 6
        (4, 3, []),  # nothing but padding
    ],
)
def test_padding_of_the_vocabulary_has_no_piece(side, tp, tp_rank, expected):
    assert rows_of(getattr(EMBEDDING, side)(QWEN2, tp, tp_rank)) == expected


@pytest.mark.parametrize(
    ("vocab_size", "tp", "expected"),
    [
        (90, 1, 128),
        (90, 4, 128),
        (128, 2, 128),
        (129, 2, 192),
        (90, 128, 128),
        (90, 3, 192),  # 64 and 128 do not divide by 3
        (151936, 8, 151936),
        (32000, 8, 32000),
        (128256, 8, 128256),
    ],
)
def test_the_vocabulary_is_padded_as_in_vllm(vocab_size, tp, expected):
    assert padded_vocab_size(vocab_size, tp) == expected


@pytest.mark.parametrize("rule", ROW_PARALLEL, ids=lambda rule: rule.hf.split(".")[-2])
def test_output_projections_are_cut_by_columns(rule):
    (piece,) = rule.megatron_pieces(QWEN2, 2, 1)
    columns = rule.shape(QWEN2)[1]
    assert piece.box == ((0, 8), (columns // 2, columns))
    assert piece.index == ((0, 8), (0, columns // 2))


def test_norms_are_whole_on_every_rank():
    norms = [rule for rule in LAYER if isinstance(rule, Copy) and rule.axis is None]
    assert len(norms) == 2
    for rule in norms:
        for rank in range(4):
            (piece,) = rule.megatron_pieces(QWEN2, 4, rank)
            assert piece.box == piece.index == ((0, 8),)


MIXTRAL = ARCHS["mixtral"]  # four experts of 4 rows; 8 hidden
AT_RANK_0 = Layout(world_size=1, tp=1, pp=1).coordinates(0)
LAYER_0 = "model.layers.0.block_sparse_moe"


def test_a_rank_counts_its_experts_from_zero():
    layout = Layout(world_size=2, tp=1, pp=1, ep=2)
    pieces = megatron_pieces(MIXTRAL, layout, layout.coordinates(1))
    found = {p.param: p.hf for p in pieces if p.param.endswith("linear_fc2.weight")}
    assert found["decoder.layers.3.mlp.experts.local_experts.0.linear_fc2.weight"] == (
        "model.layers.3.block_sparse_moe.experts.2.w2.weight"
    )
    assert len(found) == 4 * 2


def test_the_engine_stacks_experts():
    """Rank 1 of 2: rows 2 and 3 of each expert's gate (w1) over those of its up (w3)."""
    pieces = engine_pieces(MIXTRAL, EngineLayout(world_size=2, tp=2), 1)
    w13 = f"{LAYER_0}.experts.routed_experts.w13_weight"
    found = [(p.stack, p.hf, p.index[0], p.box[0]) for p in pieces if p.param == w13]
    assert found[2:4] == [
        ((1,), f"{LAYER_0}.experts.1.w1.weight", (0, 2), (2, 4)),
        ((1,), f"{LAYER_0}.experts.1.w3.weight", (2, 4), (2, 4)),
    ]
    shapes = local_shapes(pieces)
    assert shapes[w13] == (4, 4, 8)
    assert shapes[f"{LAYER_0}.experts.routed_experts.w2_weight"] == (4, 8, 2)


def test_layers_with_and_without_experts_take_their_own_rows():
    """Layers 0 and 2 are dense."""
    layout = Layout(world_size=1, tp=1, pp=1)
    names = [p.param for p in megatron_pieces(ARCHS["qwen3_moe"], layout, layout.coordinates(0))]
    for layer in range(4):
        of_layer = [name for name in names if name.startswith(f"decoder.layers.{layer}.mlp.")]
        assert any(".experts." in name for name in of_layer) == (layer % 2 == 1)
        assert any(name.endswith("mlp.linear_fc1.weight") for name in of_layer) == (layer % 2 == 0)
        assert any(".router." in name for name in of_layer) == (layer % 2 == 1)


def test_a_model_that_is_not_as_its_table_says_is_found_out():
    pieces = [
        piece
        for piece in megatron_pieces(QWEN2, Layout(world_size=1, tp=1, pp=1), AT_RANK_0)
        if piece.param.startswith("decoder.layers.0.mlp.linear_fc2")
    ]
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    check_filled({name: (8, 12)}, pieces)
    for shapes in ({name: (8, 13)}, {}, {name: (8, 12), "decoder.layers.0.extra": (1,)}):
        with pytest.raises(ValueError, match=r"the model has .* elements of it, the table"):
            check_filled(shapes, pieces)


def test_only_the_vocabulary_has_rows_that_nothing_fills():
    layout = Layout(world_size=1, tp=1, pp=1)
    pieces = megatron_pieces(QWEN2, layout, AT_RANK_0)
    shapes = local_shapes(pieces)
    check_filled({**shapes, EMBEDDING.megatron: (128, 8), "output_layer.weight": (128, 8)}, pieces)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight: the model has 80 elements"):
        check_filled({**shapes, EMBEDDING.megatron: (10, 8)}, pieces)


@pytest.mark.parametrize(
    ("tp", "tp_rank", "expected"),
    [
        (2, 0, [(0, "qkv", 0, 4), (4, "qkv", 8, 10), (6, "qkv", 12, 14)]),
        (2, 1, [(0, "qkv", 4, 8), (4, "qkv", 10, 12), (6, "qkv", 14, 16)]),
        (4, 1, [(0, "qkv", 8, 10), (2, "qkv", 12, 14)]),  # a key head and a value head
    ],
)
def test_a_rank_has_rows_of_a_stack_from_each_part(tp, tp_rank, expected):
    """8 rows of queries, then 4 of keys from row 8 on, then 4 of values from row 12 on."""
    rule = next(rule for rule in STACKED_ATTENTION if isinstance(rule, Stacked))
    assert rows_of(rule.megatron_pieces(PHI3, tp, tp_rank)) == expected
    assert list(rule.hf_shapes(PHI3).values()) == [(16, 8)]


def test_the_engine_has_a_stack_with_its_key_heads_on_several_ranks():
    rule = next(rule for rule in STACKED_ATTENTION if isinstance(rule, Stacked))
    assert rows_of(rule.engine_pieces(PHI3, 4, 1)) == [
        (0, "qkv", 2, 4),
        (2, "qkv", 8, 10),  # of the first key head, which rank 0 has, too
        (4, "qkv", 12, 14),
    ]


def test_gate_and_up_of_a_stack_are_each_cut():
    """12 rows of each: rank 2 of 4 has rows 6 to 8 of gate, and of up behind it."""
    rule = next(rule for rule in STACKED_DENSE if isinstance(rule, Stacked))
    expected = [(0, "gate_up", 6, 9), (3, "gate_up", 18, 21)]
    assert rows_of(rule.megatron_pieces(PHI3, 4, 2)) == expected
    assert rows_of(rule.engine_pieces(PHI3, 4, 2)) == expected
    assert list(rule.hf_shapes(PHI3).values()) == [(24, 8)]
