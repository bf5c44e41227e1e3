"""Hand the trained weights to the rollout engine, by plan, and prove that they arrived.

The proof: training ranks add up a checksum (checksum.py) of each Hugging Face tensor over the
pieces that they hold, every rectangle once. The ranks of an engine add up the same over their own
pieces. Both totals must be equal, tensor by tensor.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.errors import RunError
from megatron_rl.parallel.collectives import agree_or_raise, sum_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.checksum import checksum
from megatron_rl.weights.config import WeightSyncConfig
from megatron_rl.weights.layouts import (
    engine_pieces,
    expert_pieces,
    float32_names,
    hf_shapes,
    shared_pieces,
)
from megatron_rl.weights.pieces import Box, Piece
from megatron_rl.weights.plan import Holders, Move, Plan, PlanStats, build_plan
from megatron_rl.weights.transfer import execute


class EngineWeights(Protocol):
    """The engine's side of the bridge: parameters by name, to be written in place."""

    def __getitem__(self, name: str) -> Tensor:
        """The live parameter, or a staging tensor for one that the engine keeps in another form."""
        ...

    def commit(self, modules: Iterable[str]) -> None:
        """Take over what was written: everything of these modules has arrived."""
        ...

    def finish(self) -> None:
        """End the update; the last module was committed, so caches of old weights are stale."""
        ...


class NoEngine:
    """That side on a rank that only trains."""

    def __getitem__(self, name: str) -> Tensor:
        raise KeyError(name)

    def commit(self, modules: Iterable[str]) -> None:
        assert not list(modules)

    def finish(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """The numbers of one sync on this rank."""

    received_bytes: int
    verified_tensors: int


def sync_metrics(report: SyncReport, world: dist.ProcessGroup) -> dict[str, float]:
    """Metrics of one sync over all ranks; every rank calls it."""
    (received,) = sum_over([report.received_bytes], world)
    return {
        "weights/sync_bytes": received,
        "weights/verified_tensors": float(report.verified_tensors),
    }


def training_holders(arch: ModelArch, layout: Layout) -> list[Holders]:
    """The pieces of every training rank; data-parallel replicas are one holder.

    Experts have replicas of their own: their groups cut the ranks of a stage another way.
    """
    holders = [
        Holders(
            ranks=layout.ranks_of_stage(tp_rank, pp_rank),
            pieces=tuple(shared_pieces(arch, layout, tp_rank=tp_rank, pp_rank=pp_rank)),
        )
        for pp_rank in range(layout.pp)
        for tp_rank in range(layout.tp)
    ]
    if arch.mixture is None:
        return holders
    return holders + [
        Holders(
            ranks=layout.ranks_of_experts(etp_rank, ep_rank, pp_rank),
            pieces=tuple(
                expert_pieces(arch, layout, etp_rank=etp_rank, ep_rank=ep_rank, pp_rank=pp_rank)
            ),
        )
        for pp_rank in range(layout.pp)
        for ep_rank in range(layout.ep)
        for etp_rank in range(layout.etp)
    ]


def engine_holders(arch: ModelArch, engines: EngineLayout) -> list[Holders]:
    """The pieces of every engine rank; ranks with equal tp_rank, one per engine, are one holder."""
    return [
        Holders(
            ranks=engines.ranks_of(tp_rank), pieces=tuple(engine_pieces(arch, engines, tp_rank))
        )
        for tp_rank in range(engines.tp)
    ]


def plan_sync(
    arch: ModelArch,
    layout: Layout,
    engines: EngineLayout,
    *,
    rank: int,
    itemsize: int,
    mib: int,
    nodes: Sequence[int],
    in_float32: bool = False,
) -> Plan:
    """The plan that every sync of a run executes; needs no process group.

    in_float32: that of the tensors which are float32 in a model of any dtype; else of all others.
    """
    exact = float32_names(arch)
    names = exact if in_float32 else hf_shapes(arch).keys() - exact
    return build_plan(
        of_tensors(training_holders(arch, layout), names),
        of_tensors(engine_holders(arch, engines), names),
        rank=rank,
        itemsize=itemsize,
        bucket_bytes=mib << 20,
        nodes=nodes,
    )


def of_tensors(holders: Iterable[Holders], names: Collection[str]) -> list[Holders]:
    """The holders with the pieces of these Hugging Face tensors alone."""
    return [
        replace(holder, pieces=tuple(piece for piece in holder.pieces if piece.hf in names))
        for holder in holders
    ]


class WeightSync:
    """The bridge of one run: plan once, push every iteration.

    What is float32 in a model of any dtype goes over a part of its own, which is small.
    """

    def __init__(
        self,
        arch: ModelArch,
        groups: Groups,
        config: WeightSyncConfig,
        engine: EngineWeights,
        dtype: torch.dtype,
    ) -> None:
        self._groups, self._every, self._engine = groups, config.verify_one_in, engine
        assert isinstance(groups.engines, EngineLayout)
        self._engines = groups.engines
        plan = partial(
            plan_sync,
            arch,
            groups.layout,
            self._engines,
            rank=groups.rank,
            mib=config.bucket_mib,
            nodes=groups.nodes,
        )
        exact = float32_names(arch)
        trained = [name for name in hf_shapes(arch) if name not in exact]
        self._parts = [_Part(arch, groups, engine, plan(itemsize=dtype.itemsize), trained, dtype)]
        if exact:
            width = torch.float32
            small = plan(itemsize=width.itemsize, in_float32=True)
            self._parts.append(_Part(arch, groups, engine, small, sorted(exact), width))
        self._pushes = 0

    @property
    def stats(self) -> PlanStats:
        """Of the weights in the engine's dtype."""
        return self._parts[0].plan.stats

    def push(self, params: Mapping[str, Tensor]) -> SyncReport:
        """Make the engine's weights equal to params; every rank of the run calls it.

        params: none on a rank that only samples.

        Raises:
            RunError: on all ranks, naming the tensors that arrived wrong.
        """
        every = self._every if self._pushes else 1
        first = self._pushes % every
        self._pushes += 1
        with torch.no_grad():
            arrived = [part.move(params, part.names[first::every]) for part in self._parts]
            self._engine.finish()
            checks = [
                part.wrong(params, part.names[first::every], sums)
                for part, sums in zip(self._parts, arrived, strict=True)
            ]
        wrong = list(chain.from_iterable(checks))
        checked = sum(len(part.names[first::every]) for part in self._parts)
        error: Exception | None = None
        if wrong:
            error = RunError(
                f"weight sync: {len(wrong)} of {checked} verified tensors differ between "
                f"policy and engine {self._engines.engine_of(self._groups.rank)}: "
                f"{wrong[:4]}. Sampling would go on with other weights than were trained"
            )
        agree_or_raise(error, self._groups.world)
        return SyncReport(
            received_bytes=sum(part.received_bytes for part in self._parts),
            verified_tensors=checked,
        )


class _Part:
    """The tensors that travel in one dtype."""

    def __init__(
        self,
        arch: ModelArch,
        groups: Groups,
        engine: EngineWeights,
        plan: Plan,
        names: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        engines = groups.engines
        assert isinstance(engines, EngineLayout)
        self.plan, self.names = plan, names
        self._groups, self._engine, self._dtype = groups, engine, dtype
        own = frozenset(names)
        self._sources = _owned(of_tensors(training_holders(arch, groups.layout), own), groups.rank)
        self._has_engine = engines.has(groups.rank)
        tp_rank = engines.tp_rank_of(groups.rank) if self._has_engine else None
        self._targets, self._copies = _copies(
            of_tensors(engine_holders(arch, engines), own), tp_rank
        )

    @property
    def received_bytes(self) -> int:
        """What this rank receives from others in a push."""
        received = sum(
            move.numel
            for bucket in self.plan.buckets
            for move in bucket
            if move.receiver == self._groups.rank != move.sender
        )
        return received * self._dtype.itemsize

    def move(self, params: Mapping[str, Tensor], checked: Sequence[str]) -> Tensor:
        """Hand the weights over; checksums [len(checked), copies] int64 of what arrived here."""
        line_of = {name: line for line, name in enumerate(checked)}
        arrived = torch.zeros(len(checked), self._copies, dtype=torch.int64)

        def commit(moves: tuple[Move, ...]) -> None:
            modules = sorted({move.module for move in moves})
            for module in modules:
                for piece, copies in self._targets[module]:
                    if piece.hf in line_of:
                        # The engine may keep what travels in 16 bits in float32: the same values.
                        values = piece.of(self._engine).to(self._dtype)
                        total = checksum(values, piece.box).cpu()
                        arrived[line_of[piece.hf], list(copies)] += total
            self._engine.commit(modules)

        execute(
            self.plan,
            params,
            self._engine,
            group=self._groups.bridge,
            dtype=self._dtype,
            device=self._groups.platform.current_device(),
            after_bucket=commit,
        )
        return arrived

    def wrong(
        self, params: Mapping[str, Tensor], checked: Sequence[str], arrived: Tensor
    ) -> list[str]:
        """Names of the tensors whose checksum differs in any copy that this engine holds.

        arrived: this rank's part, as move() returned it.
        """
        line_of = {name: line for line, name in enumerate(checked)}
        expected = torch.zeros(len(checked), dtype=torch.int64)
        for piece in self._sources:
            if piece.hf in line_of:
                values = piece.of(params).to(self._dtype)
                expected[line_of[piece.hf]] += checksum(values, piece.box).cpu()
        dist.all_reduce(expected, group=self._groups.world)
        if not self._has_engine:
            return []
        dist.all_reduce(arrived, group=self._groups.engine)
        is_wrong = (arrived != expected[:, None]).any(dim=1)
        return [name for name, bad in zip(checked, is_wrong.tolist(), strict=True) if bad]


def _owned(holders: Sequence[Holders], rank: int) -> list[Piece]:
    """The pieces that this rank counts, so that each rectangle of the model is counted once.

    The first rank of the first holder counts it. Others that hold the same would add it again: its
    data-parallel replicas, norms at other tp_ranks, the second copy of a tied embedding.
    """
    owner: dict[tuple[str, Box], int] = {}
    for holder in holders:
        for piece in holder.pieces:
            owner.setdefault((piece.hf, piece.box), holder.ranks[0])
    return [
        piece
        for holder in holders
        if holder.ranks[0] == rank
        for piece in holder.pieces
        if owner[piece.hf, piece.box] == rank
    ]


Copies = dict[str, list[tuple[Piece, tuple[int, ...]]]]


def _copies(holders: Sequence[Holders], tp_rank: int | None) -> tuple[Copies, int]:
    """This engine rank's pieces by module, and the copies of the model that each counts in.

    tp_rank: in the engine; None: this rank has none, and no pieces.

    An engine holds some rectangles several times, and each must be checked. So several complete
    models are added up, each with another replica: as many as the most replicated has holders.

    Example: 2 key heads over TP 4. A query rectangle is held by one rank, key head 0 by ranks 0 and
    1, key head 1 by ranks 2 and 3, a norm by all four. Four copies are added up, each of all
    queries. Copy 2 takes the norm of rank 2, and the key heads of ranks 0 and 2: the first of two
    holders, since 2 % 2 is 0. So rank 1 counts its key head in copies 1 and 3, its norm in copy 1.
    """
    holding: dict[tuple[str, Box], list[int]] = defaultdict(list)
    for rank, holder in enumerate(holders):
        for piece in holder.pieces:
            holding[piece.hf, piece.box].append(rank)
    num_copies = max(len(ranks) for ranks in holding.values())
    by_module: Copies = defaultdict(list)
    for piece in () if tp_rank is None else holders[tp_rank].pieces:
        ranks = holding[piece.hf, piece.box]
        counts_in = tuple(copy for copy in range(num_copies) if ranks[copy % len(ranks)] == tp_rank)
        by_module[piece.param.rpartition(".")[0]].append((piece, counts_in))
    return by_module, num_copies
