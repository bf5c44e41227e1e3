"""Ways to split models with gated delta nets."""

from typing import Any

from layout import Layout
from router_reference import Auxiliary

from megatron_rl.parallel.stages import Split

NETS: dict[str, Any] = {
    "model": "qwen3_5",
    "has_least": True,
    "is_refused_with": "packed_delta_nets",
}
FEW: dict[str, Any] = {**NETS, "model": "qwen3_5_few_nets"}  # with a tied embedding
BALANCED = Auxiliary(over="sequence", balance=0.3, z=0.02)
EXPERTS: dict[str, Any] = {**NETS, "model": "qwen3_5_moe"}  # one of them behind a gate

DELTA_LAYOUTS = (
    Layout(name="one rank, delta nets", world=1, **NETS),
    Layout(name="one rank, delta nets, shared prompts", world=1, shares_prompts=True, **NETS),
    Layout(name="TP2, delta nets", world=2, tp=2, **NETS),
    Layout(
        name="TP2 SP, delta nets, all recomputed",
        world=2,
        tp=2,
        sequence_parallel=True,
        recompute="full",
        **NETS,
    ),
    Layout(name="PP2 VPP2, delta nets", world=2, pp=2, vpp=2, **NETS),
    Layout(
        name="PP2 of 1, 3, few delta nets, attention recomputed",
        world=2,
        pp=2,
        split=Split(first=1),
        recompute="selective",
        **FEW,
    ),
    Layout(name="DP2, delta nets, overlapped", world=2, overlaps_reduction=True, **NETS),
    Layout(
        name="TP2 SP PP2, few delta nets, shared prompts",
        world=4,
        tp=2,
        pp=2,
        sequence_parallel=True,
        shares_prompts=True,
        **FEW,
    ),
    Layout(name="TP4 SP, few delta nets", world=4, tp=4, sequence_parallel=True, **FEW),
    Layout(name="PP4, delta nets", world=4, pp=4, **NETS, is_daily=False),
    Layout(name="one rank, nets and experts", world=1, **EXPERTS),
    Layout(
        name="EP2, nets and experts, shared prompts", world=2, ep=2, shares_prompts=True, **EXPERTS
    ),
    Layout(name="TP2 SP, nets and experts", world=2, tp=2, sequence_parallel=True, **EXPERTS),
    Layout(name="PP2 VPP2, nets and experts", world=2, pp=2, vpp=2, **EXPERTS),
    Layout(
        name="TP2 SP EP2, nets and experts, balanced, all recomputed",
        world=4,
        tp=2,
        ep=2,
        sequence_parallel=True,
        recompute="full",
        auxiliary=BALANCED,
        **EXPERTS,
    ),
    Layout(
        name="EP2 PP2, nets and experts, overlapped",
        world=4,
        ep=2,
        pp=2,
        overlaps_reduction=True,
        **EXPERTS,
    ),
    Layout(
        name="TP2 SP EP4 ETP1, nets and experts",
        world=4,
        tp=2,
        ep=4,
        expert_tp=1,
        sequence_parallel=True,
        **EXPERTS,
    ),
)
