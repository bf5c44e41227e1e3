"""How much of a model the ranks of a layout hold, without its weights."""

import functools
import math
from dataclasses import replace

from megatron_rl.parallel.layout import Layout
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.layouts import expert_pieces, shared_pieces
from megatron_rl.weights.pieces import size


def busiest_rank(arch: ModelArch, layout: Layout) -> tuple[int, int]:
    """Parameters of the rank that holds most: those outside of experts, and those of experts."""
    return max((held_by(arch, layout, pp_rank) for pp_rank in range(layout.pp)), key=sum)


def held_by(arch: ModelArch, layout: Layout, pp_rank: int) -> tuple[int, int]:
    """The same of a pipeline rank."""
    one_copy = math.lcm(layout.tp * layout.pp, layout.etp * layout.ep * layout.pp)
    return _held_by(arch, replace(layout, world_size=one_copy), pp_rank)


@functools.cache
def _held_by(arch: ModelArch, layout: Layout, pp_rank: int) -> tuple[int, int]:
    shared = shared_pieces(arch, layout, tp_rank=0, pp_rank=pp_rank)
    held = sum(size(piece.box) for piece in shared)
    if arch.mixture is None:
        return held, 0
    # All experts are alike, so those of a rank are counted by one.
    each = arch.mixture.num_experts // layout.ep
    alone = replace(arch, mixture=replace(arch.mixture, num_experts=layout.ep))
    experts = expert_pieces(alone, layout, etp_rank=0, ep_rank=0, pp_rank=pp_rank)
    return held, each * sum(size(piece.box) for piece in experts)
