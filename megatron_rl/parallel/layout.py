"""The layouts: which rank has which place in training and in the engines.

This is arithmetic alone: every rank finds the same answer, and so does a process without ranks.
"""

from dataclasses import dataclass

from megatron_rl.parallel.stages import EVEN, Split, layers_of_stages


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The place of one rank on each axis of the training layout."""

    tp_rank: int
    dp_rank: int
    pp_rank: int
    etp_rank: int  # its place among the ranks that share one expert's matrices
    ep_rank: int  # its place among the ranks that share a layer's experts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The training layout; ranks run tensor-parallel first, then data, then pipeline (Megatron).

    Experts cut the ranks of a pipeline stage once more, in another way: expert-tensor-parallel
    first, then expert-parallel, then replicas.

    Example: 8 ranks, tp 2, pp 2, so dp is 2. Rank 5 has tp_rank 1, dp_rank 0, pp_rank 1; rank 7 has
    dp_rank 1 and holds the same weights.
    """

    world_size: int
    tp: int
    pp: int
    vpp: int = 1  # model chunks per pipeline rank
    ep: int = 1
    expert_tp: int | None = None  # None: the same as tp
    split: Split = EVEN  # of the layers over pipeline ranks

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.pp)

    @property
    def etp(self) -> int:
        return self.expert_tp or self.tp

    @property
    def expert_dp(self) -> int:
        """The number of replicas of an expert."""
        return self.tp * self.dp // (self.etp * self.ep)

    def layers_of(self, num_layers: int) -> tuple[range, ...]:
        """The layers of every stage; chunk c of pipeline rank r is stage c * pp + r."""
        return layers_of_stages(num_layers, self.pp, self.vpp, self.split)

    def coordinates(self, global_rank: int) -> Coordinates:
        in_stage = global_rank % (self.tp * self.dp)
        return Coordinates(
            tp_rank=global_rank % self.tp,
            dp_rank=global_rank // self.tp % self.dp,
            pp_rank=global_rank // (self.tp * self.dp),
            etp_rank=in_stage % self.etp,
            ep_rank=in_stage // self.etp % self.ep,
        )

    def ranks_of_stage(self, tp_rank: int, pp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same weights, one in each data-parallel replica."""
        return tuple(
            tp_rank + self.tp * (dp_rank + self.dp * pp_rank) for dp_rank in range(self.dp)
        )

    def ranks_of_experts(self, etp_rank: int, ep_rank: int, pp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same part of the same experts."""
        stage = self.tp * self.dp
        return tuple(
            pp_rank * stage + etp_rank + self.etp * (ep_rank + self.ep * replica)
            for replica in range(self.expert_dp)
        )


@dataclass(frozen=True, kw_only=True)
class EngineLayout:
    """The rollout layout: engine k is ranks [k * tp, (k + 1) * tp)."""

    world_size: int
    tp: int

    @property
    def num_engines(self) -> int:
        return self.world_size // self.tp

    def engine_of(self, global_rank: int) -> int:
        return global_rank // self.tp

    def tp_rank_of(self, global_rank: int) -> int:
        return global_rank % self.tp

    def ranks_of(self, tp_rank: int) -> tuple[int, ...]:
        """The ranks that hold the same shard of an engine, one in each engine."""
        return tuple(engine * self.tp + tp_rank for engine in range(self.num_engines))
