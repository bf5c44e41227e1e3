import itertools
from dataclasses import replace

import pytest
import torch
from weights_models import ARCHS, EIGHT_HEADS, ODD, hf_tensors

from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.weights.layouts import engine_pieces, hf_shapes, megatron_pieces
from megatron_rl.weights.pieces import local_shapes, size, view
from megatron_rl.weights.plan import Holders, build_plan
from megatron_rl.weights.sync import engine_holders, training_holders

ITEMSIZE = 4
# world, tp, pp, vpp, engine's tp
LAYOUTS = [
    (1, 1, 1, 1, 1),
    (2, 1, 1, 1, 1),
    (2, 1, 1, 1, 2),
    (2, 2, 1, 1, 1),
    (2, 2, 1, 1, 2),
    (2, 1, 2, 1, 1),
    (2, 1, 2, 2, 2),
    (4, 2, 2, 1, 2),
    (4, 2, 2, 2, 1),
    (4, 4, 1, 1, 4),
    (4, 4, 1, 1, 2),
    (4, 2, 1, 1, 4),
    (4, 1, 4, 1, 4),
]


# ... and the experts' ep and etp, for models that have some.
EXPERT_LAYOUTS = [
    (2, 1, 1, 1, 2, 2, 1),
    (4, 1, 1, 1, 1, 2, 2),
    (4, 2, 1, 1, 4, 4, 1),
    (4, 2, 1, 1, 2, 2, 2),
    (4, 1, 2, 2, 2, 2, 1),
]
# More ranks than key heads, on either side, and numbers of ranks that are no powers of two.
ODD_CASES = [
    ("odd", (3, 3, 1, 1, 1)),
    ("odd", (3, 1, 1, 1, 3)),
    ("odd", (6, 6, 1, 1, 3)),
    ("odd", (6, 3, 2, 1, 6)),
    ("eight_heads", (8, 8, 1, 1, 2)),
    ("eight_heads", (8, 2, 1, 1, 8)),
]
# ... and cp.
SHARED_SEQUENCES = [
    ("qwen2_tied", (8, 2, 2, 1, 4, 1, None, 2)),
    ("qwen3_moe", (8, 2, 1, 1, 2, 4, 1, 4)),
]
MODELS = {**ARCHS, "odd": ODD, "eight_heads": EIGHT_HEADS}
MIXTURES = [name for name, arch in ARCHS.items() if arch.mixture is not None]


def layouts_of(case):
    """(training layout, engine layout)"""
    world, tp, pp, vpp, engine_tp, ep, etp, cp = (*case, *(1, None, 1)[len(case) - 5 :])
    return (
        Layout(world_size=world, tp=tp, pp=pp, cp=cp, vpp=vpp, ep=ep, expert_tp=etp),
        EngineLayout(world_size=world, tp=engine_tp),
    )


def plans(arch, case, *, bucket_bytes=1 << 30, ranks_per_node=8, ranks=None):
    """Of all ranks, or of those asked for."""
    layout, engines = layouts_of(case)
    return [
        build_plan(
            training_holders(arch, layout),
            engine_holders(arch, engines),
            rank=rank,
            itemsize=ITEMSIZE,
            bucket_bytes=bucket_bytes,
            nodes=[rank // ranks_per_node for rank in range(layout.world_size)],
        )
        for rank in (range(layout.world_size) if ranks is None else ranks)
    ]


def pieces_of(arch, case, rank):
    """(training rank's, engine rank's)"""
    layout, engines = layouts_of(case)
    return (
        megatron_pieces(arch, layout, layout.coordinates(rank)),
        engine_pieces(arch, engines, engines.tp_rank_of(rank)),
    )


def filled(pieces, tensors):
    params = {name: torch.zeros(shape) for name, shape in local_shapes(pieces).items()}
    for piece in pieces:
        piece.of(params).copy_(view(tensors[piece.hf], piece.box))
    return params


@pytest.mark.parametrize("ranks_per_node", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ARCHS for case in LAYOUTS]
    + [(name, case) for name in MIXTURES for case in EXPERT_LAYOUTS]
    + ODD_CASES
    + SHARED_SEQUENCES,
)
def test_every_engine_element_arrives(name, case, ranks_per_node):
    """Every rank's moves, made by hand in one process."""
    arch, world = MODELS[name], case[0]
    tensors = hf_tensors(arch)
    own = [pieces_of(arch, case, rank) for rank in range(world)]
    sources = [filled(train, tensors) for train, _ in own]
    wanted = [filled(engine, tensors) for _, engine in own]
    arrived = [{k: torch.full_like(v, torch.nan) for k, v in w.items()} for w in wanted]
    per_rank = plans(arch, case, ranks_per_node=ranks_per_node)
    (hops,) = {plan.num_hops for plan in per_rank}
    for hop, (rank, plan) in itertools.product(range(hops), enumerate(per_rank)):
        for move in (move for bucket in plan.buckets for move in bucket if move.hop == hop):
            assert rank in (move.sender, move.receiver)
            if move.receiver == rank:
                place = move.target.of(arrived[rank])
                assert place.isnan().all(), "received twice"
                values = move.source.of((arrived if hop else sources)[move.sender])
                assert values.numel() == move.numel
                place.copy_(values)
    for got, want in zip(arrived, wanted, strict=True):
        assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("qwen2", (4, 2, 2, 1, 1)),  # either node lacks a stage, and has two engines
        ("qwen2", (8, 2, 2, 1, 1)),
        ("qwen2", (8, 1, 4, 1, 2)),
        ("qwen2", (8, 4, 1, 1, 4)),
        ("qwen2", (8, 4, 2, 1, 1)),  # more engines on a node than ranks elsewhere that hold it
        ("qwen3_moe", (8, 2, 2, 1, 1, 4, 1)),
        ("mixtral", (8, 1, 2, 1, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("ranks_per_node", [2, 4])
def test_what_a_node_lacks_comes_to_it_once(name, case, ranks_per_node):
    """For each shard of an engine; counted element by element."""
    arch, (layout, engines) = ARCHS[name], layouts_of(case)
    nodes = range(case[0] // ranks_per_node)
    held = {
        n: {k: torch.zeros(s, dtype=torch.bool) for k, s in hf_shapes(arch).items()} for n in nodes
    }
    for rank in range(case[0]):
        for piece in megatron_pieces(arch, layout, layout.coordinates(rank)):
            view(held[rank // ranks_per_node][piece.hf], piece.box).fill_(True)
    lacking = 0
    for node, shard in itertools.product(nodes, range(engines.tp)):
        ranks = range(node * ranks_per_node, (node + 1) * ranks_per_node)
        if shard in map(engines.tp_rank_of, ranks):
            for piece in engine_pieces(arch, engines, shard):
                lacking += int((~view(held[node][piece.hf], piece.box)).sum()) * ITEMSIZE
    per_rank = plans(arch, case, ranks_per_node=ranks_per_node)
    assert per_rank[0].stats.between_nodes == lacking
    needed = [missing_bytes(arch, case, rank) for rank in range(case[0])]
    assert per_rank[0].stats.wire_total == sum(needed)  # and to each rank once, as ever


def missing_bytes(arch, case, rank):
    """What this rank's engine shard needs that its training shard does not hold."""
    train, engine = pieces_of(arch, case, rank)
    missing = 0
    for name, shape in hf_shapes(arch).items():
        held = torch.zeros(shape, dtype=torch.bool)
        for piece in (p for p in train if p.hf == name):
            view(held, piece.box).fill_(True)
        for piece in (p for p in engine if p.hf == name):
            missing += int((~view(held, piece.box)).sum())
    return missing * ITEMSIZE


@pytest.mark.parametrize(
    ("name", "case"),
    [("qwen2", case) for case in LAYOUTS]
    + [("qwen3_moe", case) for case in EXPERT_LAYOUTS]
    + ODD_CASES
    + SHARED_SEQUENCES,
)
def test_no_byte_travels_that_need_not(name, case):
    arch = MODELS[name]
    needed = [missing_bytes(arch, case, rank) for rank in range(case[0])]
    stats = plans(arch, case)[0].stats
    assert stats.wire_total == sum(needed)
    assert stats.received_max == max(needed)


COINCIDING = (
    (1, 1, 1, 1, 1),
    (4, 1, 1, 1, 1),  # every rank has everything
    (4, 1, 1, 1, 4),
    (2, 2, 1, 1, 2),  # the same heads, in another order
    (4, 2, 1, 1, 2),
)
LATENTS = [name for name, arch in ARCHS.items() if arch.latent is not None]


@pytest.mark.parametrize("case", COINCIDING)
@pytest.mark.parametrize("name", [name for name in ARCHS if name not in LATENTS])
def test_nothing_travels_where_layouts_coincide(name, case):
    stats = plans(ARCHS[name], case)[0].stats
    assert (stats.wire_total, stats.sent_max, stats.received_max) == (0, 0, 0)


@pytest.mark.parametrize("case", COINCIDING)
@pytest.mark.parametrize("name", LATENTS)
def test_rows_of_latent_vectors_alone_travel_where_layouts_coincide(name, case):
    """A rank of the policy has some of them, one of the engine all."""
    arch, tp = ARCHS[name], case[1]
    rows = sum(rows for _, rows in arch.latent_rows)
    lacked = rows * (tp - 1) // tp * arch.hidden_size * arch.num_layers
    assert plans(arch, case)[0].stats.received_max == 4 * lacked


def test_replicas_share_the_sending():
    """TP2 DP2 to whole engines: a half is there twice and wanted twice, so each sends it once."""
    stats = plans(ARCHS["qwen2"], (4, 2, 1, 1, 1))[0].stats
    assert 0 < stats.sent_max <= stats.received_max


def test_a_neighbour_on_the_node_is_preferred():
    """Four ranks on two nodes, TP2 DP2: either half is there twice, once on each node."""
    stats = plans(ARCHS["qwen2"], (4, 2, 1, 1, 1), ranks_per_node=2)[0].stats
    assert stats.wire_total > 0
    assert stats.between_nodes == 0


def sent_by(per_rank):
    """Bytes that each rank sends, by its own plan."""
    return [
        sum(m.numel * ITEMSIZE for b in plan.buckets for m in b if rank == m.sender != m.receiver)
        for rank, plan in enumerate(per_rank)
    ]


@pytest.mark.parametrize("ranks_per_node", [4, 64])
def test_replicas_share_the_sending_of_many_modules(ranks_per_node):
    """Sixteen of each shard: none sends more than another by more than the largest module."""
    case = (64, 2, 2, 1, 4)
    layout, engines = layouts_of(case)
    arch = ARCHS["qwen2"]
    per_rank = plans(arch, case, ranks_per_node=ranks_per_node)
    sent = sent_by(per_rank)
    assert sum(sent) == per_rank[0].stats.wire_total
    assert max(sent) == per_rank[0].stats.sent_max
    modules = {}
    for piece in engine_pieces(arch, engines, 0):
        module = piece.param.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + size(piece.box) * ITEMSIZE
    for holder in training_holders(arch, layout):
        shares = [sent[rank] for rank in holder.ranks]
        assert min(shares) > 0
        assert max(shares) - min(shares) <= max(modules.values())


@pytest.mark.parametrize(
    ("name", "case"),
    [("qwen2", (8, 2, 2, 1, 1)), ("qwen2", (8, 4, 1, 1, 2)), ("qwen3_moe", EXPERT_LAYOUTS[1])],
)
def test_both_ends_expect_the_same_moves_in_the_same_order(name, case):
    """Nothing but values travels: sender and receiver must agree on what follows what."""
    per_rank = plans(ARCHS[name], case, bucket_bytes=1500, ranks_per_node=2)
    travelling = 0
    for buckets in zip(*(plan.buckets for plan in per_rank), strict=True):
        for sender, receiver in itertools.permutations(range(case[0]), 2):
            sent, received = (
                [m for m in buckets[rank] if (m.sender, m.receiver) == (sender, receiver)]
                for rank in (sender, receiver)
            )
            assert sent == received
            travelling += len(sent)
    assert travelling > 100


@pytest.mark.parametrize(
    ("name", "case"),
    [("qwen2", (1024, 2, 2, 1, 4)), ("qwen3_moe", (1024, 2, 1, 1, 2, 4, 1))],
)
def test_a_thousand_ranks_are_planned_like_a_few(name, case):
    """One rank's plan costs what that rank moves, not what all do."""
    ranks = (0, 777, 1023)
    for rank, plan in zip(ranks, plans(ARCHS[name], case, ranks=ranks), strict=True):
        moves = [move for bucket in plan.buckets for move in bucket]
        received = sum(m.numel for m in moves if rank == m.receiver != m.sender) * ITEMSIZE
        assert received == missing_bytes(ARCHS[name], case, rank)
        assert plan.stats.received_max >= received
        assert plan.stats.sent_max <= 1.5 * plan.stats.wire_total / case[0]


def test_buckets_are_alike_on_all_ranks_and_keep_the_limit():
    arch, case, limit = ARCHS["qwen2"], (2, 2, 1, 1, 1), 1500
    per_rank = plans(arch, case, bucket_bytes=limit)
    (count,) = {len(plan.buckets) for plan in per_rank}
    assert count > 4
    for number in range(count):
        for rank, plan in enumerate(per_rank):
            moves = [m for m in plan.buckets[number] if m.sender != m.receiver]
            modules = {m.module for m in moves}
            for which in ("sender", "receiver"):
                size = sum(m.numel * ITEMSIZE for m in moves if getattr(m, which) == rank)
                assert size <= limit or len(modules) == 1, "a module alone may be more"
    whole = plans(arch, case)
    for cut, uncut in zip(per_rank, whole, strict=True):
        assert [m for b in cut.buckets for m in b] != []
        assert {m for b in cut.buckets for m in b} == {m for b in uncut.buckets for m in b}


def test_a_module_is_in_one_bucket():
    """A module is committed as a whole when its bucket has arrived."""
    for plan in plans(ARCHS["llama"], (2, 1, 2, 1, 1), bucket_bytes=1500):
        buckets_of = {}
        for number, bucket in enumerate(plan.buckets):
            for move in bucket:
                buckets_of.setdefault(move.module, set()).add(number)
        assert all(len(numbers) == 1 for numbers in buckets_of.values())


def build(sources, targets):
    return build_plan(sources, targets, rank=0, itemsize=4, bucket_bytes=1 << 20, nodes=[0, 0])


def broken(change):
    arch = ARCHS["qwen2"]
    layout, engines = Layout(world_size=2, tp=2, pp=1), EngineLayout(world_size=2, tp=1)
    first, second = training_holders(arch, layout)
    pieces = change(list(first.pieces))
    return build(
        [Holders(ranks=first.ranks, pieces=tuple(pieces)), second], engine_holders(arch, engines)
    )


def test_a_hole_is_an_error_at_plan_time():
    def without_gate(pieces):
        return [p for p in pieces if "layers.2.mlp.gate" not in p.hf]

    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.gate_proj.*cover 48 of 96 elements"):
        broken(without_gate)


def test_an_overlap_is_an_error_at_plan_time():
    def one_row_too_many(pieces):
        return [
            replace(p, index=((0, 7), p.index[1]), box=((0, 7), p.box[1]))
            if "layers.2.mlp.gate" in p.hf
            else p
            for p in pieces
        ]

    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.gate_proj\.weight: sources overlap"):
        broken(one_row_too_many)


def test_a_tensor_that_nobody_holds_is_an_error():
    def without_norm(pieces):
        return [p for p in pieces if p.hf != "model.norm.weight"]

    arch = ARCHS["qwen2"]
    sources = [
        replace(holder, pieces=tuple(without_norm(list(holder.pieces))))
        for holder in training_holders(arch, Layout(world_size=2, tp=2, pp=1))
    ]
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*cover 0 of 8"):
        build(sources, engine_holders(arch, EngineLayout(world_size=2, tp=1)))
