"""The layouts: which rank has which place in training and in the engines.

This is arithmetic alone: every rank finds the same answer, and so does a process without ranks.
"""

import math
from dataclasses import dataclass

from megatron_rl.parallel.stages import EVEN, Split, layers_of_stages


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The place of one rank on each axis of the training layout."""

    tp_rank: int
    cp_rank: int  # its place among the ranks that share every sequence
    dp_rank: int
    pp_rank: int
    etp_rank: int  # its place among the ranks that share one expert's matrices
    ep_rank: int  # its place among the ranks that share a layer's experts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The training layout; ranks run along TP first, then CP, DP and PP, as in Megatron.

    Experts cut the ranks of a pipeline stage once more, in another way: expert-tensor-parallel
    first, then expert-parallel, then replicas.

    Example: 8 ranks, tp 2, pp 2, so dp is 2. Rank 5 has tp_rank 1, dp_rank 0, pp_rank 1; rank 7 has
    dp_rank 1 and holds the same weights. With cp 2 instead of dp 2 it has cp_rank 1: the same
    weights again, and the other half of every sequence.
    """

    world_size: int
    tp: int
    pp: int
    cp: int = 1
    vpp: int = 1  # model chunks per pipeline rank
    ep: int = 1
    expert_tp: int | None = None  # None: the same as tp
    split: Split = EVEN  # of the layers over pipeline ranks

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage, which are consecutive."""
        return self.tp * self.copies

    @property
    def axes(self) -> str:
        """The sizes, to be read."""
        shared = f" x CP {self.cp}" if self.cp > 1 else ""
        return f"TP {self.tp}{shared} x PP {self.pp} x DP {self.dp}"

    @property
    def experts(self) -> str:
        """What is to be read behind the axes where experts lie on several ranks; else nothing."""
        return f", experts over EP {self.ep}" if self.ep > 1 else ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks, TP, PP, chunks and, where it is not 1, CP: what checkpoints keep."""
        return (self.world_size, self.tp, self.pp, self.vpp, *((self.cp,) if self.cp > 1 else ()))

    @property
    def copies(self) -> int:
        """The ranks that hold the same weights outside of experts."""
        return self.cp * self.dp

    @property
    def etp(self) -> int:
        return self.expert_tp or self.tp

    @property
    def expert_dp(self) -> int:
        """The number of replicas of an expert."""
        return self.tp * self.copies // (self.etp * self.ep)

    def row_multiple(self, *, sequence_parallel: bool) -> int:
        """What the length of a packed row is a multiple of, so that ranks can share it."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if sequence_parallel else 1)

    def layers_of(self, num_layers: int) -> tuple[range, ...]:
        """The layers of every stage; chunk c of pipeline rank r is stage c * pp + r."""
        return layers_of_stages(num_layers, self.pp, self.vpp, self.split)

    def coordinates(self, global_rank: int) -> Coordinates:
        stage = self.stage_size
        in_stage = global_rank % stage
        return Coordinates(
            tp_rank=global_rank % self.tp,
            cp_rank=global_rank // self.tp % self.cp,
            dp_rank=in_stage // (self.tp * self.cp),
            pp_rank=global_rank // stage,
            etp_rank=in_stage % self.etp,
            ep_rank=in_stage // self.etp % self.ep,
        )

    def ranks_of_stage(self, tp_rank: int, pp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same weights, cp in each data-parallel replica."""
        return tuple(
            tp_rank + self.tp * (copy + self.copies * pp_rank) for copy in range(self.copies)
        )

    def ranks_of_experts(self, etp_rank: int, ep_rank: int, pp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same part of the same experts."""
        stage = self.stage_size
        return tuple(
            pp_rank * stage + etp_rank + self.etp * (ep_rank + self.ep * replica)
            for replica in range(self.expert_dp)
        )


@dataclass(frozen=True, kw_only=True)
class EngineLayout:
    """The rollout layout: engine k is ranks [first + k * tp, first + (k + 1) * tp)."""

    world_size: int
    tp: int
    first: int = 0  # rank of the job, where others before it only train

    @property
    def num_engines(self) -> int:
        return self.world_size // self.tp

    @property
    def size(self) -> int:
        """Ranks of an engine."""
        return self.tp

    @property
    def told(self) -> str:
        """What an engine is, to be read."""
        return f"TP {self.tp}"

    @property
    def in_step(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that generate in step, which those of an engine do."""
        return tuple(
            tuple(range(self.first + engine * self.tp, self.first + (engine + 1) * self.tp))
            for engine in range(self.num_engines)
        )

    def has(self, global_rank: int) -> bool:
        """True for a rank of an engine."""
        return self.first <= global_rank < self.first + self.world_size

    def engine_of(self, global_rank: int) -> int:
        return (global_rank - self.first) // self.tp

    def tp_rank_of(self, global_rank: int) -> int:
        return (global_rank - self.first) % self.tp

    def place_of(self, global_rank: int) -> int:
        """Its number among the ranks of its engine."""
        return self.tp_rank_of(global_rank)

    def ranks_of(self, tp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same shard of an engine, one in each engine."""
        return tuple(self.first + engine * self.tp + tp_rank for engine in range(self.num_engines))


@dataclass(frozen=True)
class PolicyEngines:
    """The policy as engines: each is a copy of the model on tp x pp ranks.

    Ranks that share experts with others generate in step with them, each with its own prompts.
    """

    layout: Layout

    @property
    def num_engines(self) -> int:
        return self.layout.copies

    @property
    def size(self) -> int:
        """Ranks of an engine."""
        return self.layout.tp * self.layout.pp

    @property
    def told(self) -> str:
        """What an engine is, to be read."""
        return f"TP {self.layout.tp} x PP {self.layout.pp}"

    @property
    def in_step(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that generate in step."""
        layout, stage = self.layout, self.layout.stage_size
        span = math.lcm(layout.tp, layout.etp * layout.ep)
        return tuple(
            tuple(
                pp_rank * stage + rank
                for pp_rank in range(layout.pp)
                for rank in range(start, start + span)
            )
            for start in range(0, stage, span)
        )

    def engine_of(self, global_rank: int) -> int:
        return global_rank % self.layout.stage_size // self.layout.tp

    def place_of(self, global_rank: int) -> int:
        """Its number among the ranks of its engine."""
        here = self.layout.coordinates(global_rank)
        return here.tp_rank + self.layout.tp * here.pp_rank
