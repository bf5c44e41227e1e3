"""Ways to split models with gated delta nets."""

from typing import Any

from layout import Layout

from megatron_rl.parallel.stages import Split

NETS: dict[str, Any] = {
    "model": "qwen3_5",
    "has_least": True,
    "is_refused_with": "packed_delta_nets",
}
FEW: dict[str, Any] = {**NETS, "model": "qwen3_5_few_nets"}  # with a tied embedding

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
)
