"""Execute a reshard plan: pack, exchange, unpack, bucket by bucket."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_rl.weights.pieces import Tensors
from megatron_rl.weights.plan import Move, Plan


def execute(
    plan: Plan,
    sources: Tensors,
    target: Tensors,
    *,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    after_bucket: Callable[[tuple[Move, ...]], None],
) -> None:
    """Move every rectangle of the plan; every rank of group must call it.

    Values are cast to dtype while they are packed, so the wire carries the engine's bytes. Sender
    and receiver order a bucket's moves alike, so no headers travel. after_bucket gets the moves
    that have arrived here, local ones included.
    """
    rank = group.rank()
    for bucket in plan.buckets:
        for hop in range(plan.num_hops):
            moves = [move for move in bucket if move.hop == hop]
            _exchange(moves, target if hop else sources, target, group, dtype, device)
        after_bucket(tuple(move for move in bucket if move.receiver == rank))


def _exchange(
    moves: Sequence[Move],
    sources: Tensors,
    target: Tensors,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Move the rectangles of one hop of one bucket, in one all-to-all."""
    rank, world = group.rank(), group.size()
    outgoing = sorted(
        (m for m in moves if m.sender == rank != m.receiver), key=lambda m: m.receiver
    )
    incoming = sorted((m for m in moves if m.receiver == rank != m.sender), key=lambda m: m.sender)
    out_sizes, in_sizes = [0] * world, [0] * world
    for move in outgoing:
        out_sizes[move.receiver] += move.numel
    for move in incoming:
        in_sizes[move.sender] += move.numel
    packed = torch.empty(sum(out_sizes), dtype=dtype, device=device)
    at = 0
    for move in outgoing:
        values = move.source.of(sources)
        packed[at : at + move.numel].view(values.shape).copy_(values)
        at += move.numel
    arrived = torch.empty(sum(in_sizes), dtype=dtype, device=device)
    dist.all_to_all_single(arrived, packed, in_sizes, out_sizes, group=group)
    at = 0
    for move in incoming:
        place = move.target.of(target)
        place.copy_(arrived[at : at + move.numel].view(place.shape))
        at += move.numel
    for move in moves:
        if move.sender == move.receiver == rank:
            move.target.of(target).copy_(move.source.of(sources))
