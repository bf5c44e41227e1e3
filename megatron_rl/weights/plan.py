"""The static reshard plan: which rectangle of whose parameter goes to which rectangle of whose.

Computed once per (source layout, destination layout), from sizes alone and identically on every
rank. A byte that a rank already holds is never received; a missing byte is received once. It comes
from a rank of the node that holds it; where there is none, the replica elsewhere that has sent
least sends it to one rank of the node, which hands it on to the others there. Completeness is
checked here: a destination element without a source is an error at plan time, since vLLM accepts
half an update without a word.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_rl.weights.pieces import Box, Piece, intersection, size

Ranks = NDArray[np.int64]


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
    source: Piece  # of the sender's policy, or, in hop 1, of its engine
    target: Piece
    unit: str  # destination module, committed as a whole
    numel: int
    hop: int = 0  # 1: handed on within a node, once hop 0 of the bucket has arrived


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
    num_hops: int  # of every rank: 1 where nobody hands anything on, else 2
    stats: PlanStats


def build_plan(
    sources: Sequence[Holders],
    targets: Sequence[Holders],
    *,
    rank: int,
    itemsize: int,
    bucket_bytes: int,
    nodes: Sequence[int],
) -> Plan:
    """Plan one reshard; `rank` keeps only the moves it takes part in.

    nodes: of every rank, the number of its node.

    Raises:
        ValueError: a destination rectangle that no source covers, or sources that overlap
            without being equal. Both are faults of a layout.
    """
    node_of = np.array(nodes)
    traffic = _Traffic(node_of)
    moves: list[tuple[int, Move]] = []
    routes: dict[_Ends, _Route] = {}
    for shipment in sorted(_match(sources, targets), key=lambda s: _natural(s.unit)):
        if shipment.ends not in routes:
            routes[shipment.ends] = _Route(shipment.ends, node_of)
        route = routes[shipment.ends]
        senders = route.senders(traffic.sent)
        unit = traffic.add(shipment.unit, senders, route.receivers, shipment.numel * itemsize)
        moves += [(unit, move) for move in shipment.moves_of(rank, senders, route)]
    bucket_of = traffic.cut(bucket_bytes)
    buckets: list[list[Move]] = [[] for _ in range(1 + max(bucket_of, default=-1))]
    for unit, move in moves:
        buckets[bucket_of[unit]].append(move)
    need = max((sum(size(p.box) for p in holder.pieces) for holder in targets), default=0)
    return Plan(
        buckets=tuple(tuple(bucket) for bucket in buckets),
        num_hops=1 + any(route.hands_on for route in routes.values()),
        stats=traffic.stats(need * itemsize, len(buckets)),
    )


@dataclass(frozen=True)
class _Ends:
    """The ranks that want something, and those that hold it, replicas of a holder together."""

    receivers: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]


@dataclass
class _Shipment:
    """What one destination module gets between the same ends."""

    unit: str
    ends: _Ends
    numel: int = 0
    rectangles: list[tuple[Piece, tuple[Piece, ...]]] = field(default_factory=list)
    """What is wanted, and the piece of each holder."""

    def moves_of(self, rank: int, senders: Ranks, route: "_Route") -> Iterator[Move]:
        """The moves that rank takes part in, given the sender of each receiver."""
        for number in np.flatnonzero((senders == rank) | (route.receivers == rank)).tolist():
            sender, receiver = int(senders[number]), int(route.receivers[number])
            holder = int(route.holder_of[sender])
            for target, pieces in self.rectangles:
                source, hop = (target, 1) if holder < 0 else (pieces[holder], 0)
                yield Move(sender, receiver, source, target, self.unit, size(target.box), hop)


def _match(sources: Sequence[Holders], targets: Sequence[Holders]) -> list[_Shipment]:
    """Every destination rectangle, cut along the edges of the sources that cover it."""
    owners: dict[str, list[tuple[tuple[int, ...], Piece]]] = defaultdict(list)
    for holder in sources:
        for piece in holder.pieces:
            owners[piece.hf].append((holder.ranks, piece))
    shipments: dict[tuple[str, _Ends], _Shipment] = {}
    for holder in targets:
        for piece in holder.pieces:
            unit = piece.param.rpartition(".")[0]
            parts: dict[Box, list[tuple[tuple[int, ...], Piece]]] = defaultdict(list)
            for ranks, owned in owners[piece.hf]:
                box = intersection(piece.box, owned.box)
                if box is not None:
                    parts[box].append((ranks, owned.within(box)))
            _check_cover(piece, list(parts))
            for box, found in sorted(parts.items(), key=lambda part: part[0]):
                ends = _Ends(holder.ranks, tuple(ranks for ranks, _ in found))
                shipment = shipments.setdefault((unit, ends), _Shipment(unit, ends))
                shipment.numel += size(box)
                shipment.rectangles.append((piece.within(box), tuple(held for _, held in found)))
    return list(shipments.values())


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


class _Route:
    """Between two ends; who sends is decided shipment by shipment.

    Receivers are told by their place in `receivers`.
    """

    def __init__(self, ends: _Ends, node_of: Ranks) -> None:
        self.receivers = np.array(ends.receivers)
        self.holder_of = np.full(len(node_of), -1)  # of each rank; -1: it holds nothing of this
        for number, ranks in enumerate(ends.holders):
            self.holder_of[list(ranks)] = number
        self._holding = np.flatnonzero(self.holder_of >= 0)
        lacking = np.flatnonzero(self.holder_of[self.receivers] < 0)
        self._near: list[tuple[Ranks, Ranks]] = []  # a node's receivers, and its ranks that hold it
        far: dict[int, list[Ranks]] = defaultdict(list)  # receivers of a node, by their number
        for node in np.unique(node_of[self.receivers[lacking]]):
            here = lacking[node_of[self.receivers[lacking]] == node]
            holding = self._holding[node_of[self._holding] == node]
            if holding.size:
                self._near.append((here, holding))
            else:
                far[len(here)].append(here)
        self._far = [np.stack(rows) for _, rows in sorted(far.items())]  # [nodes, receivers] each

    @property
    def hands_on(self) -> bool:
        return any(grid.shape[1] > 1 for grid in self._far)

    def senders(self, sent: Ranks) -> Ranks:
        """Of each receiver: itself, else in turns those who may, beginning with who sent least.

        Where no rank of a node holds it, one gets it from elsewhere and hands it on to the others.
        """
        senders = self.receivers.copy()
        for here, holding in self._near:
            senders[here] = _turns(holding, sent, len(here))
        turns = _turns(self._holding, sent, sum(len(grid) for grid in self._far))
        for grid in self._far:
            first = grid[np.arange(len(grid)), np.argmin(sent[self.receivers[grid]], axis=1)]
            senders[grid] = self.receivers[first][:, None]
            senders[first], turns = turns[: len(grid)], turns[len(grid) :]
        return senders


def _turns(ranks: Ranks, sent: Ranks, count: int) -> Ranks:
    """count of the ranks, again and again, beginning with the one that has sent least."""
    return np.resize(ranks[np.argsort(sent[ranks], kind="stable")], count)


class _Traffic:
    """Bytes out of and into every rank, by destination module."""

    def __init__(self, node_of: Ranks) -> None:
        self._node_of = node_of
        self.sent = np.zeros(len(node_of), dtype=np.int64)
        self._between_nodes = 0
        self._units: list[str] = []
        self._rows: list[Ranks] = []  # of each unit: out of each rank, then into each

    def add(self, unit: str, senders: Ranks, receivers: Ranks, nbytes: int) -> int:
        """Count nbytes from each sender to its receiver; the number of the unit."""
        if not self._units or self._units[-1] != unit:
            self._units.append(unit)
            self._rows.append(np.zeros(2 * len(self._node_of), dtype=np.int64))
        travels = senders != receivers
        senders, receivers = senders[travels], receivers[travels]
        out = nbytes * np.bincount(senders, minlength=len(self._node_of))
        self.sent += out
        self._rows[-1][: len(out)] += out
        self._rows[-1][len(out) + receivers] += nbytes
        crossing = self._node_of[senders] != self._node_of[receivers]
        self._between_nodes += nbytes * int(crossing.sum())
        return len(self._units) - 1

    def cut(self, bucket_bytes: int) -> list[int]:
        """Bucket of each unit; a new one where any rank's bytes in or out would pass the limit."""
        buckets: list[int] = []
        bucket, load = 0, np.zeros(2 * len(self._node_of), dtype=np.int64)
        for row in self._rows:
            if load.any() and (load + row)[row > 0].max(initial=0) > bucket_bytes:
                load[:] = 0
                bucket += 1
            load += row
            buckets.append(bucket)
        return buckets

    def stats(self, need: int, num_buckets: int) -> PlanStats:
        received = sum((row[len(self._node_of) :] for row in self._rows), np.zeros_like(self.sent))
        return PlanStats(
            received_max=int(received.max(initial=0)),
            sent_max=int(self.sent.max(initial=0)),
            wire_total=int(self.sent.sum()),
            between_nodes=self._between_nodes,
            need_max=need,
            num_buckets=num_buckets,
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """layers.2 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
