"""The static reshard plan: which rectangle of whose parameter goes to which rectangle of whose.

Computed once per (source layout, destination layout), from sizes alone and identically on every
rank. A byte that a rank already holds is never received; a missing byte is received once, from
the same node where possible, else from the replica that has sent least. Completeness is checked
here: a destination element without a source is an error at plan time, since vLLM accepts half an
update without a word.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rl.weights.pieces import Box, Piece, intersection, size


@dataclass(frozen=True, kw_only=True)
class Holders:
    """Ranks that hold the same pieces."""

    ranks: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One rectangle on its way; sender and receiver are global ranks."""

    sender: int
    receiver: int
    source: Piece
    target: Piece
    unit: str  # destination module, committed as a whole
    numel: int


@dataclass(frozen=True, kw_only=True)
class PlanStats:
    """Bytes of one execution."""

    received_max: int  # by the rank that receives most
    sent_max: int
    wire_total: int  # over all ranks
    between_nodes: int
    need_max: int  # what the largest destination shard holds
    num_buckets: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The moves of one rank, bucket by bucket, and what all ranks move together."""

    buckets: tuple[tuple[Move, ...], ...]
    stats: PlanStats


def build_plan(
    sources: Sequence[Holders],
    targets: Sequence[Holders],
    *,
    rank: int,
    itemsize: int,
    bucket_bytes: int,
    node_of: Callable[[int], int],
) -> Plan:
    """Plan one reshard; `rank` keeps only the moves it takes part in.

    Raises:
        ValueError: a destination rectangle that no source covers, or sources that overlap
            without being equal. Both are faults of a layout.
    """
    moves = _choose_senders(_match(sources, targets), node_of, itemsize)
    units = sorted({move.unit for move in moves}, key=_natural)
    bucket_of = _cut_buckets(moves, units, itemsize, bucket_bytes)
    num_buckets = 1 + max(bucket_of.values(), default=-1)
    buckets: list[list[Move]] = [[] for _ in range(num_buckets)]
    for move in moves:
        if rank in (move.sender, move.receiver):
            buckets[bucket_of[move.unit]].append(move)
    need = max((sum(size(p.box) for p in holder.pieces) for holder in targets), default=0)
    return Plan(
        buckets=tuple(tuple(bucket) for bucket in buckets),
        stats=_stats(moves, need * itemsize, num_buckets, itemsize, node_of),
    )


@dataclass(frozen=True)
class _Match:
    receivers: tuple[int, ...]
    target: Piece
    candidates: tuple[tuple[int, Piece], ...]  # (rank, source piece) that hold the whole of it


def _match(sources: Sequence[Holders], targets: Sequence[Holders]) -> list[_Match]:
    """Every destination rectangle, cut along the edges of the sources that cover it."""
    owners: dict[str, list[tuple[tuple[int, ...], Piece]]] = defaultdict(list)
    for holder in sources:
        for piece in holder.pieces:
            owners[piece.hf].append((holder.ranks, piece))
    matches: list[_Match] = []
    for holder in targets:
        for piece in holder.pieces:
            parts: dict[Box, list[tuple[int, Piece]]] = defaultdict(list)
            for ranks, owned in owners[piece.hf]:
                box = intersection(piece.box, owned.box)
                if box is not None:
                    parts[box].extend((rank, owned.within(box)) for rank in ranks)
            _check_cover(piece, list(parts))
            matches += [
                _Match(holder.ranks, piece.within(box), tuple(sorted(found, key=lambda f: f[0])))
                for box, found in sorted(parts.items())
            ]
    return matches


def _check_cover(piece: Piece, boxes: list[Box]) -> None:
    covered = sum(size(box) for box in boxes)
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if intersection(box, other) is not None:
                raise ValueError(f"{piece.hf}: sources overlap in {box} and {other}")
    if covered != size(piece.box):
        raise ValueError(
            f"{piece.hf}{list(piece.box)}: sources cover {covered} of {size(piece.box)} elements"
        )


def _choose_senders(
    matches: list[_Match], node_of: Callable[[int], int], itemsize: int
) -> list[Move]:
    sent: dict[int, int] = defaultdict(int)
    moves: list[Move] = []
    for match in matches:
        numel = size(match.target.box)
        unit = match.target.param.rpartition(".")[0]
        for receiver in match.receivers:
            sender, source = min(
                match.candidates,
                key=lambda c: (
                    c[0] != receiver,
                    node_of(c[0]) != node_of(receiver),
                    sent[c[0]],
                    c[0],
                ),
            )
            if sender != receiver:
                sent[sender] += numel * itemsize
            moves.append(Move(sender, receiver, source, match.target, unit, numel))
    return moves


def _cut_buckets(
    moves: list[Move], units: list[str], itemsize: int, bucket_bytes: int
) -> dict[str, int]:
    """Bucket of each unit; a new one where any rank's bytes in or out would pass the limit."""
    traffic: dict[str, dict[tuple[str, int], int]] = {unit: defaultdict(int) for unit in units}
    for move in moves:
        if move.sender != move.receiver:
            traffic[move.unit]["out", move.sender] += move.numel * itemsize
            traffic[move.unit]["in", move.receiver] += move.numel * itemsize
    bucket_of: dict[str, int] = {}
    load: dict[tuple[str, int], int] = defaultdict(int)
    bucket = 0
    for unit in units:
        if load and any(load[k] + n > bucket_bytes for k, n in traffic[unit].items()):
            load.clear()
            bucket += 1
        for k, n in traffic[unit].items():
            load[k] += n
        bucket_of[unit] = bucket
    return bucket_of


def _stats(
    moves: list[Move], need: int, num_buckets: int, itemsize: int, node_of: Callable[[int], int]
) -> PlanStats:
    received: dict[int, int] = defaultdict(int)
    sent: dict[int, int] = defaultdict(int)
    between = 0
    for move in moves:
        if move.sender == move.receiver:
            continue
        received[move.receiver] += move.numel * itemsize
        sent[move.sender] += move.numel * itemsize
        if node_of(move.sender) != node_of(move.receiver):
            between += move.numel * itemsize
    return PlanStats(
        received_max=max(received.values(), default=0),
        sent_max=max(sent.values(), default=0),
        wire_total=sum(received.values()),
        between_nodes=between,
        need_max=need,
        num_buckets=num_buckets,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
