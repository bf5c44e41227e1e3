"""A way in which a model is split in the tests of gradients."""

from dataclasses import dataclass
from typing import Any

from router_reference import Auxiliary

from megatron_rl.parallel.stages import EVEN, Split


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to split a model; what is left of the world is data-parallel."""

    name: str
    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None
    ep: int = 1
    expert_tp: int | None = None
    split: Split = EVEN  # of the layers over pipeline ranks
    sequence_parallel: bool = False
    model: str = "qwen2"
    recompute: str | None = None
    chunk_rows: int | None = None  # most rows of logits alive at a time
    ops: str = "auto"
    overlaps_reduction: bool = False  # of gradients with the backward
    has_every_preset: bool = False  # else a few, since each adds a second or two
    has_least: bool = False  # only what a way to split a model could get wrong
    takes_turns: bool = False  # the least, and of all other cases those whose turn it is
    is_daily: bool = True  # else measured for the published table alone
    megatron: tuple[tuple[str, Any], ...] = ()  # fields of Megatron-Core that a recipe may set
    shares_prompts: bool = False
    auxiliary: Auxiliary | None = None  # losses of routers
    is_refused_with: str | None = None  # a fault of Megatron-Core, at versions that have it
