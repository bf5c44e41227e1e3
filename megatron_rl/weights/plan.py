"""The static reshard plan: which rectangle of whose parameter goes to which rectangle of whose.

A plan is computed once per (source layout, destination layout), from sizes alone and identically on
every rank. A byte that a rank already holds is never received; a missing byte is received once. It
comes from a rank of the node that holds it; where there is none, the replica elsewhere that has
sent least sends it to one rank of the node, which hands it on to the others there. Completeness is
checked here: a destination element without a source is an error at plan time, since vLLM accepts
half an update without a word.

Example: matrices a.weight and b.weight, each [8, 2] in float32. Ranks 0 and 1 are one node, ranks 2
and 3 another. Rank 0 trains rows 0 to 3 of a, rank 1 its rows 4 to 7 (one pipeline stage, cut in
two); ranks 2 and 3 train b likewise. Every rank is an engine of its own and wants both matrices.

1. `_match` cuts what is wanted along the edges of what is held: four halves. Each becomes a
   `_Shipment`: all that one destination module gets between the same `_Ends`. For the upper half of
   a the receivers are ranks 0, 1, 2 and 3, and rank 0 alone holds it.
2. `_Route.senders` finds a sender for each receiver. "2 -> 3" is hop 1: rank 2 hands on from its
   engine what hop 0 brought there.

       upper a    0 has it    0 -> 1 within the node    0 -> 2 between nodes, then 2 -> 3
       lower a    1 has it    1 -> 0                    1 -> 3, then 3 -> 2
       upper b    2 has it    2 -> 3                    2 -> 0, then 0 -> 1
       lower b    3 has it    3 -> 2                    3 -> 1, then 1 -> 0

   The lower half of a goes to rank 3 first since rank 2 has handed on the upper one: of those who
   may do something, who has sent least does it.
3. `_Traffic` counts. A half has 32 bytes, so for module a ranks 0 and 1 send 64 bytes and receive
   32, ranks 2 and 3 the reverse; for module b it is the other way round. With bucket_bytes=64 each
   module is a bucket; with 96 both would share one.

In all each rank receives and sends 96 bytes, 384 are on the wire, and 128 of them cross between
the nodes: without handing on it would be 256.
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
    """Ranks that hold the same pieces: replicas of each other."""

    ranks: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One rectangle on its way; sender and receiver are global ranks, equal for a local copy."""

    sender: int
    receiver: int
    source: Piece  # of the sender's policy, or, in hop 1, of its engine
    target: Piece
    module: str  # the engine's module that the target belongs to, committed as a whole
    numel: int
    hop: int = 0  # 1: handed on within a node, once hop 0 of the bucket has arrived


@dataclass(frozen=True, kw_only=True)
class PlanStats:
    """The bytes of one execution."""

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
    num_hops: int  # the same on every rank: 1 where nobody hands anything on, else 2
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
    """The plan of one reshard as `rank` needs it: with only those moves it takes part in.

    nodes[r] is the number of rank r's node.

    Raises:
        ValueError: a destination rectangle that no source covers, or sources that overlap
            without being equal. Both are faults of a layout.
    """
    node_of = np.array(nodes)
    traffic = _Traffic(node_of)
    moves: list[tuple[int, Move]] = []
    routes: dict[_Ends, _Route] = {}
    for shipment in sorted(_match(sources, targets), key=lambda s: _natural(s.module)):
        if shipment.ends not in routes:
            routes[shipment.ends] = _Route(shipment.ends, node_of)
        route = routes[shipment.ends]
        senders = route.senders(traffic.sent)
        number = traffic.add(shipment.module, senders, route.receivers, shipment.numel * itemsize)
        moves += [(number, move) for move in shipment.moves_of(rank, senders, route)]
    bucket_of = traffic.cut(bucket_bytes)
    buckets: list[list[Move]] = [[] for _ in range(1 + max(bucket_of, default=-1))]
    for number, move in moves:
        buckets[bucket_of[number]].append(move)
    need = max((sum(size(p.box) for p in holder.pieces) for holder in targets), default=0)
    return Plan(
        buckets=tuple(tuple(bucket) for bucket in buckets),
        num_hops=1 + any(route.hands_on for route in routes.values()),
        stats=traffic.stats(need * itemsize, len(buckets)),
    )


@dataclass(frozen=True)
class _Ends:
    """The ranks that want a rectangle, and those that hold it: one tuple of replicas per holder."""

    receivers: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]


@dataclass
class _Shipment:
    """All rectangles that one destination module gets between the same ends."""

    module: str
    ends: _Ends
    numel: int = 0
    rectangles: list[tuple[Piece, tuple[Piece, ...]]] = field(default_factory=list)
    """Each target, with the same rectangle as a piece of each holder, in the order of the ends."""

    def moves_of(self, rank: int, senders: Ranks, route: "_Route") -> Iterator[Move]:
        """The moves that rank takes part in; senders[k] sends to route.receivers[k]."""
        for place in np.flatnonzero((senders == rank) | (route.receivers == rank)).tolist():
            sender, receiver = int(senders[place]), int(route.receivers[place])
            holder = int(route.holder_of[sender])
            for target, pieces in self.rectangles:
                # A sender that holds nothing itself hands on what it was sent: from its own target.
                source, hop = (target, 1) if holder < 0 else (pieces[holder], 0)
                yield Move(sender, receiver, source, target, self.module, size(target.box), hop)


def _match(sources: Sequence[Holders], targets: Sequence[Holders]) -> list[_Shipment]:
    """The shipments of every destination rectangle, cut along the edges of its sources."""
    owners: dict[str, list[tuple[tuple[int, ...], Piece]]] = defaultdict(list)
    for holder in sources:
        for piece in holder.pieces:
            owners[piece.hf].append((holder.ranks, piece))
    shipments: dict[tuple[str, _Ends], _Shipment] = {}
    for holder in targets:
        for piece in holder.pieces:
            module = piece.param.rpartition(".")[0]
            parts: dict[Box, list[tuple[tuple[int, ...], Piece]]] = defaultdict(list)
            for ranks, owned in owners[piece.hf]:
                box = intersection(piece.box, owned.box)
                if box is not None:
                    parts[box].append((ranks, owned.within(box)))
            _check_cover(piece, list(parts))
            for box, found in sorted(parts.items(), key=lambda part: part[0]):
                ends = _Ends(holder.ranks, tuple(ranks for ranks, _ in found))
                shipment = shipments.setdefault((module, ends), _Shipment(module, ends))
                shipment.numel += size(box)
                shipment.rectangles.append((piece.within(box), tuple(held for _, held in found)))
    return list(shipments.values())


def _check_cover(piece: Piece, boxes: list[Box]) -> None:
    """Refuse boxes, all inside piece.box, that overlap or leave a hole.

    A piece has few sources, so pairs are compared; dcp_files.check_cover has thousands of chunks.
    """
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
    """The ways between two ends; who sends is decided shipment by shipment.

    Arrays of receivers hold their places in `receivers`, not their ranks.
    """

    def __init__(self, ends: _Ends, node_of: Ranks) -> None:
        self.receivers = np.array(ends.receivers)
        self.holder_of = np.full(len(node_of), -1)  # by rank, in ends.holders; -1: it holds nothing
        for number, ranks in enumerate(ends.holders):
            self.holder_of[list(ranks)] = number
        self._holding = np.flatnonzero(self.holder_of >= 0)
        lacking = np.flatnonzero(self.holder_of[self.receivers] < 0)
        # Nodes that hold it: the receivers there that lack it, and the ranks there that hold it.
        self._near: list[tuple[Ranks, Ranks]] = []
        # Nodes that do not: their receivers, by how many there are, so that they can be stacked.
        far: dict[int, list[Ranks]] = defaultdict(list)
        for node in np.unique(node_of[self.receivers[lacking]]):
            here = lacking[node_of[self.receivers[lacking]] == node]
            holding = self._holding[node_of[self._holding] == node]
            if holding.size:
                self._near.append((here, holding))
            else:
                far[len(here)].append(here)
        self._far = [np.stack(alike) for _, alike in sorted(far.items())]  # [nodes, receivers] each

    @property
    def hands_on(self) -> bool:
        """True where a node that holds nothing of this has several receivers."""
        return any(grid.shape[1] > 1 for grid in self._far)

    def senders(self, sent: Ranks) -> Ranks:
        """The rank that sends to each receiver, given the bytes that each rank has sent so far.

        A receiver that holds it is its own sender. One beside a rank of its node that holds it gets
        it from there. On any other node one receiver gets it from elsewhere and sends to the rest.
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
    """The ranks in turns, `count` in all, beginning with the one that has sent least.

    Where rank 0 has sent 9 bytes and rank 4 has sent 5, three turns are 4, 0, 4.
    """
    return np.resize(ranks[np.argsort(sent[ranks], kind="stable")], count)


class _Traffic:
    """The bytes out of and into every rank, by destination module."""

    def __init__(self, node_of: Ranks) -> None:
        self._node_of = node_of
        self.sent = np.zeros(len(node_of), dtype=np.int64)
        self._between_nodes = 0
        self._modules: list[str] = []
        self._loads: list[Ranks] = []  # per module: bytes out of each rank, then into each

    def add(self, module: str, senders: Ranks, receivers: Ranks, nbytes: int) -> int:
        """Count nbytes from each sender to its receiver; returns the module's number.

        All shipments of a module must be added one after the other.
        """
        if not self._modules or self._modules[-1] != module:
            self._modules.append(module)
            self._loads.append(np.zeros(2 * len(self._node_of), dtype=np.int64))
        travels = senders != receivers
        senders, receivers = senders[travels], receivers[travels]
        out = nbytes * np.bincount(senders, minlength=len(self._node_of))
        self.sent += out
        self._loads[-1][: len(out)] += out
        self._loads[-1][len(out) + receivers] += nbytes
        crossing = self._node_of[senders] != self._node_of[receivers]
        self._between_nodes += nbytes * int(crossing.sum())
        return len(self._modules) - 1

    def cut(self, bucket_bytes: int) -> list[int]:
        """Each module's bucket; a new one begins where any rank's bytes would pass the limit."""
        buckets: list[int] = []
        bucket, total = 0, np.zeros(2 * len(self._node_of), dtype=np.int64)
        for load in self._loads:
            if total.any() and (total + load)[load > 0].max(initial=0) > bucket_bytes:
                total[:] = 0
                bucket += 1
            total += load
            buckets.append(bucket)
        return buckets

    def stats(self, need: int, num_buckets: int) -> PlanStats:
        received = sum((load[len(self.sent) :] for load in self._loads), np.zeros_like(self.sent))
        return PlanStats(
            received_max=int(received.max(initial=0)),
            sent_max=int(self.sent.max(initial=0)),
            wire_total=int(self.sent.sum()),
            between_nodes=self._between_nodes,
            need_max=need,
            num_buckets=num_buckets,
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key under which layers.2 comes before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
