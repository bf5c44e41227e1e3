"""The ways in which models are split in the tests of gradients."""

from dataclasses import dataclass
from typing import Any

from reference import Auxiliary

from megatron_rl.megatron import faults
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
    megatron: tuple[tuple[str, Any], ...] = ()  # fields of Megatron-Core that a recipe may set
    auxiliary: Auxiliary | None = None  # losses of routers
    is_refused_with: str | None = None  # a fault of Megatron-Core, at versions that have it


OVER_SEQUENCES = Auxiliary(over="sequence", balance=0.3, z=0.02)
OVER_UPDATE = Auxiliary(over="update", balance=0.2)
EVERY_LAYOUT = (
    Layout(name="one rank", world=1, has_every_preset=True),
    Layout(name="one rank, llama", world=1, model="llama"),
    Layout(name="one rank, llama3 rope", world=1, model="llama3_rope"),
    Layout(name="DP2", world=2, has_every_preset=True),
    Layout(name="TP2", world=2, tp=2, has_every_preset=True),
    Layout(name="TP2 SP", world=2, tp=2, sequence_parallel=True, has_every_preset=True),
    Layout(name="PP2", world=2, pp=2, has_every_preset=True),
    Layout(name="PP2 VPP2", world=2, pp=2, vpp=2, has_every_preset=True),
    Layout(name="PP2, tied", world=2, pp=2, model="qwen2_tied"),
    Layout(name="TP2, tied", world=2, tp=2, model="qwen2_tied"),
    Layout(name="TP2 SP, llama", world=2, tp=2, sequence_parallel=True, model="llama"),
    Layout(
        name="TP2 SP, all recomputed, logits by 7 rows",
        world=2,
        tp=2,
        sequence_parallel=True,
        recompute="full",
        chunk_rows=7,
    ),
    Layout(name="TP2, definitions, logits by 7 rows", world=2, tp=2, ops="reference", chunk_rows=7),
    Layout(name="PP2, tied, definitions", world=2, pp=2, model="qwen2_tied", ops="reference"),
    Layout(name="DP2, overlapped", world=2, overlaps_reduction=True),
    Layout(name="DP2, tied, overlapped", world=2, model="qwen2_tied", overlaps_reduction=True),
    Layout(name="PP2, attention recomputed", world=2, pp=2, recompute="selective"),
    Layout(name="TP2 PP2", world=4, tp=2, pp=2, has_every_preset=True),
    Layout(name="TP2 DP2", world=4, tp=2, has_every_preset=True),
    Layout(name="PP2 DP2", world=4, pp=2, has_every_preset=True),
    Layout(name="TP2 SP PP2 VPP2", world=4, tp=2, pp=2, vpp=2, sequence_parallel=True),
    Layout(name="PP2 VPP2 DP2", world=4, pp=2, vpp=2),
    Layout(name="PP4", world=4, pp=4),
    Layout(name="DP4", world=4),
    Layout(
        name="TP2 SP PP2, tied", world=4, tp=2, pp=2, sequence_parallel=True, model="qwen2_tied"
    ),
    Layout(name="PP2 VPP2 DP2, tied", world=4, pp=2, vpp=2, model="qwen2_tied"),
    Layout(
        name="PP2 DP2, tied, overlapped, definitions",
        world=4,
        pp=2,
        model="qwen2_tied",
        ops="reference",
        overlaps_reduction=True,
    ),
    Layout(name="CP2", world=2, cp=2, has_every_preset=True),
    Layout(name="CP2, tied, definitions", world=2, cp=2, model="qwen2_tied", ops="reference"),
    Layout(name="CP4", world=4, cp=4),
    Layout(name="CP2 DP2, overlapped", world=4, cp=2, overlaps_reduction=True),
    Layout(name="TP2 SP CP2", world=4, tp=2, cp=2, sequence_parallel=True),
    Layout(name="CP2 PP2 VPP2, all recomputed", world=4, cp=2, pp=2, vpp=2, recompute="full"),
    Layout(name="CP2 PP2, llama3 rope", world=4, cp=2, pp=2, model="llama3_rope"),
    Layout(name="CP2 EP2", world=2, cp=2, ep=2, model="qwen3_moe", has_least=True),
    Layout(
        name="TP2 SP CP2 EP4 ETP1",
        world=4,
        tp=2,
        cp=2,
        ep=4,
        expert_tp=1,
        sequence_parallel=True,
        model="mixtral",
        has_least=True,
    ),
    Layout(name="TP4 over 2 key heads", world=4, tp=4),
    Layout(name="TP4 SP over 2 key heads", world=4, tp=4, sequence_parallel=True),
    Layout(name="TP2 PP2, llama3 rope", world=4, tp=2, pp=2, model="llama3_rope"),
    Layout(name="TP2, qwen3", world=2, tp=2, model="qwen3", has_least=True),
    Layout(
        name="TP2 SP, qwen3", world=2, tp=2, sequence_parallel=True, model="qwen3", has_least=True
    ),
    Layout(name="one rank, experts", world=1, model="qwen3_moe_raw", has_least=True),
    Layout(name="EP2", world=2, ep=2, model="qwen3_moe", has_least=True),
    Layout(
        name="TP2 SP, experts",
        world=2,
        tp=2,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(
        name="TP2 SP EP2 ETP1",
        world=2,
        tp=2,
        ep=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(name="DP4 EP2", world=4, ep=2, model="qwen3_moe", has_least=True),
    Layout(
        name="DP4 EP2, overlapped",
        world=4,
        ep=2,
        model="qwen3_moe",
        has_least=True,
        overlaps_reduction=True,
    ),
    Layout(name="DP4 EP2 ETP2", world=4, ep=2, expert_tp=2, model="qwen3_moe", has_least=True),
    Layout(
        name="TP2 SP EP2",
        world=4,
        tp=2,
        ep=2,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(
        name="TP2 SP EP4 ETP1",
        world=4,
        tp=2,
        ep=4,
        expert_tp=1,
        sequence_parallel=True,
        model="mixtral",
        has_least=True,
    ),
    Layout(
        name="TP4 SP EP2 ETP2",
        world=4,
        tp=4,
        ep=2,
        expert_tp=2,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
    ),
    Layout(
        name="EP2 PP2 VPP2, mixed, tied",
        world=4,
        ep=2,
        pp=2,
        vpp=2,
        model="qwen3_moe_mixed",
        has_least=True,
    ),
    Layout(
        name="TP2 SP ETP1, EP1",
        world=2,
        tp=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
        is_refused_with="experts_of_smaller_tensor_parallelism",
    ),
    Layout(
        name="TP4 SP ETP2, EP1",
        world=4,
        tp=4,
        expert_tp=2,
        sequence_parallel=True,
        model="mixtral",
        has_least=True,
        is_refused_with="experts_of_smaller_tensor_parallelism",
    ),
    Layout(
        name="TP2, without initialization",
        world=2,
        tp=2,
        has_least=True,
        megatron=(("perform_initialization", False),),
        is_refused_with="weights_without_marks",
    ),
    Layout(
        name="TP2 SP PP2, tied, without initialization",
        world=4,
        tp=2,
        pp=2,
        sequence_parallel=True,
        model="qwen2_tied",
        has_least=True,
        megatron=(("perform_initialization", False),),
        is_refused_with="weights_without_marks",
    ),
    Layout(
        name="PP2 VPP2, outputs deallocated",
        world=2,
        pp=2,
        vpp=2,
        has_least=True,
        megatron=(("deallocate_pipeline_outputs", True),),
    ),
    Layout(
        name="TP2, all recomputed, settings of memory and speed",
        world=2,
        tp=2,
        recompute="full",
        has_least=True,
        megatron=(
            ("distribute_saved_activations", True),
            ("bias_activation_fusion", True),
            ("bias_dropout_fusion", True),
            ("deterministic_mode", True),
        ),
    ),
    Layout(
        name="TP2 SP EP2 ETP1, settings",
        world=2,
        tp=2,
        ep=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe",
        has_least=True,
        megatron=(
            ("clone_scatter_output_in_embedding", False),
            ("moe_router_dtype", "fp64"),
            ("bias_activation_fusion", True),
        ),
    ),
    Layout(
        name="one rank, balanced",
        world=1,
        model="qwen3_moe_mixed",
        auxiliary=OVER_SEQUENCES,
        has_least=True,
    ),
    Layout(
        name="DP2, balanced",
        world=2,
        model="qwen3_moe_mixed",
        auxiliary=OVER_UPDATE,
        has_least=True,
    ),
    Layout(
        name="CP2 EP2, all recomputed, balanced",
        world=2,
        cp=2,
        ep=2,
        recompute="full",
        model="qwen3_moe_mixed",
        auxiliary=OVER_SEQUENCES,
        has_least=True,
    ),
    Layout(
        name="TP2 SP EP2 ETP1, balanced",
        world=2,
        tp=2,
        ep=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe_mixed",
        auxiliary=OVER_SEQUENCES,
        has_least=True,
    ),
    Layout(
        name="TP2 SP CP2 EP2 ETP1, balanced",
        world=4,
        tp=2,
        cp=2,
        ep=2,
        expert_tp=1,
        sequence_parallel=True,
        model="qwen3_moe_mixed",
        auxiliary=OVER_UPDATE,
        has_least=True,
    ),
    Layout(
        name="EP2 PP2 VPP2, mixture recomputed, balanced",
        world=4,
        ep=2,
        pp=2,
        vpp=2,
        recompute="experts",
        model="qwen3_moe_mixed",
        auxiliary=OVER_SEQUENCES,
        has_least=True,
    ),
    # Models of four layers where nothing else is said; names give the layers of each stage.
    Layout(name="PP2 of 1, 3", world=2, pp=2, split=Split(first=1), has_least=True),
    Layout(name="CP2 PP2 of 3, 1", world=4, cp=2, pp=2, split=Split(last=1), has_least=True),
    Layout(
        name="PP2 of 3, 1, tied",
        world=2,
        pp=2,
        split=Split(last=1),
        model="qwen2_tied",
        has_least=True,
    ),
    Layout(
        name="PP2 of 1, 3, mixed",
        world=2,
        pp=2,
        split=Split(first=1, last=3),
        model="qwen3_moe_mixed",
        has_least=True,
    ),
    Layout(
        name="PP2 VPP2 of 1, 2, 1, 2, tied",
        world=2,
        pp=2,
        vpp=2,
        split=Split(first=2, last=4),
        model="qwen2_six_layers",
        has_least=True,
    ),
    Layout(
        name="PP2 VPP3 of 0, 1, 1, 1, 1, 0",
        world=2,
        pp=2,
        vpp=3,
        split=Split(counts_embedding=True, counts_loss=True),
        has_least=True,
    ),
    Layout(
        name="PP4 of 0, 1, 1, 0",
        world=4,
        pp=4,
        split=Split(counts_embedding=True, counts_loss=True),
        model="qwen2_two_layers",
        has_least=True,
    ),
    Layout(
        name="PP4 of 3, 1, 1, 1, tied",
        world=4,
        pp=4,
        split=Split(first=3),
        model="qwen2_six_layers",
        has_least=True,
    ),
    Layout(
        name="TP2 SP PP2 VPP2 of 1, 2, 2, 1, tied, all recomputed",
        world=4,
        tp=2,
        pp=2,
        vpp=2,
        split=Split(counts_embedding=True, counts_loss=True),
        sequence_parallel=True,
        recompute="full",
        model="qwen2_six_layers",
        has_least=True,
    ),
)
LAYOUTS = tuple(
    layout
    for layout in EVERY_LAYOUT
    if layout.is_refused_with is None or not faults.is_present(layout.is_refused_with)
)
