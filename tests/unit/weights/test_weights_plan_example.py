"""The worked examples of weights/plan.py: what they say is what build_plan returns."""

import numpy as np
import pytest

from megatron_rl.weights.pieces import Piece
from megatron_rl.weights.plan import Holders, _turns, build_plan

NODES = [0, 0, 1, 1]
UPPER, LOWER = ((0, 4), (0, 2)), ((4, 8), (0, 2))
# (sender, receiver, hop), rank 0's own copy of the upper half of a first.
MOVES = {
    ("a", UPPER): {(0, 0, 0), (0, 1, 0), (0, 2, 0), (2, 3, 1)},
    ("a", LOWER): {(1, 1, 0), (1, 0, 0), (1, 3, 0), (3, 2, 1)},
    ("b", UPPER): {(2, 2, 0), (2, 3, 0), (2, 0, 0), (0, 1, 1)},
    ("b", LOWER): {(3, 3, 0), (3, 2, 0), (3, 1, 0), (1, 0, 1)},
}


def half(matrix, box):
    return Piece(f"stage.{matrix}", ((0, 4), (0, 2)), f"{matrix}.weight", box)


def whole(matrix):
    everything = ((0, 8), (0, 2))
    return Piece(f"{matrix}.weight", everything, f"{matrix}.weight", everything)


def plans(bucket_bytes):
    sources = [
        Holders(ranks=(rank,), pieces=(half(matrix, box),))
        for rank, (matrix, box) in enumerate(MOVES)
    ]
    targets = [Holders(ranks=(0, 1, 2, 3), pieces=(whole("a"), whole("b")))]
    return [
        build_plan(sources, targets, rank=rank, itemsize=4, bucket_bytes=bucket_bytes, nodes=NODES)
        for rank in range(4)
    ]


def test_each_half_takes_the_way_of_the_table():
    found = {key: set() for key in MOVES}
    for plan in plans(64):
        for move in (move for bucket in plan.buckets for move in bucket):
            assert move.numel == 8
            found[move.module, move.target.box].add((move.sender, move.receiver, move.hop))
    assert found == MOVES


def test_what_is_handed_on_is_read_from_the_engine():
    (move,) = [m for bucket in plans(64)[2].buckets for m in bucket if m.hop and m.sender == 2]
    assert move.source == move.target == whole("a").within(UPPER)


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"), [(64, [{"a"}, {"b"}]), (95, [{"a"}, {"b"}]), (96, [{"a", "b"}])]
)
def test_modules_share_a_bucket_up_to_its_size(bucket_bytes, expected):
    for plan in plans(bucket_bytes):
        assert [{move.module for move in bucket} for bucket in plan.buckets] == expected


def test_bytes_of_each_module_and_of_all():
    sent, received = np.zeros((2, 4), int), np.zeros((2, 4), int)
    for rank, plan in enumerate(plans(64)):
        assert plan.num_hops == 2
        for number, bucket in enumerate(plan.buckets):
            travels = [move for move in bucket if move.sender != move.receiver]
            sent[number, rank] = sum(4 * move.numel for move in travels if move.sender == rank)
            received[number, rank] = sum(
                4 * move.numel for move in travels if move.receiver == rank
            )
    assert sent.tolist() == [[64, 64, 32, 32], [32, 32, 64, 64]]
    assert received.tolist() == [[32, 32, 64, 64], [64, 64, 32, 32]]
    stats = plans(64)[0].stats
    assert (stats.sent_max, stats.received_max, stats.need_max) == (96, 96, 128)
    assert (stats.wire_total, stats.between_nodes) == (384, 128)


def test_turns_begin_with_who_has_sent_least():
    assert _turns(np.array([0, 4]), np.array([9, 0, 0, 0, 5]), 3).tolist() == [4, 0, 4]
