"""More ways to split a model: up to eight ranks, and what does not divide by two."""

from dataclasses import replace
from typing import Any

from layout import Layout

from megatron_rl.parallel.stages import Split

SP: dict[str, Any] = {"sequence_parallel": True}
EXPERTS: dict[str, Any] = {"model": "qwen3_moe"}
COUNTS_ENDS = Split(counts_embedding=True, counts_loss=True)
FAULTY = {"is_refused_with": "experts_of_smaller_tensor_parallelism"}

# Vocabularies of 151 are padded to 192, and at other numbers of ranks than powers of two further.
ODD_SIZES = (
    Layout(name="TP2, tied, vocabulary of 151", world=2, tp=2, model="qwen2_eight_heads"),
    Layout(
        name="TP4 SP over 2 key heads, tied, vocabulary of 151",
        world=4,
        tp=4,
        **SP,
        model="qwen2_eight_heads",
    ),
    Layout(name="TP3 over 3 key heads, vocabulary of 151", world=3, tp=3, model="qwen2_odd"),
    Layout(name="TP3 SP over 3 key heads, tied", world=3, tp=3, **SP, model="qwen2_odd_tied"),
    Layout(name="CP3", world=3, cp=3),
    Layout(name="PP3 of 1, 2, 1", world=3, pp=3, split=Split(first=1, last=1)),
    Layout(name="TP6 over 3 key heads", world=6, tp=6, model="qwen2_odd"),
    Layout(name="TP2 CP3", world=6, tp=2, cp=3, model="qwen2_tied"),
    Layout(name="TP3 SP PP2", world=6, tp=3, pp=2, **SP, model="qwen2_odd"),
)
DENSE = (
    Layout(name="DP8", world=8),
    Layout(name="CP8", world=8, cp=8),
    Layout(
        name="TP8 over 2 key heads, tied, vocabulary of 151",
        world=8,
        tp=8,
        model="qwen2_eight_heads",
    ),
    Layout(
        name="TP8 SP over 2 key heads, tied, vocabulary of 151",
        world=8,
        tp=8,
        **SP,
        model="qwen2_eight_heads",
    ),
    Layout(name="PP8", world=8, pp=8, model="qwen2_eight_layers"),
    Layout(name="TP2 PP2 DP2", world=8, tp=2, pp=2),
    Layout(name="TP2 SP CP2 DP2", world=8, tp=2, cp=2, **SP),
    Layout(name="TP2 SP CP2 PP2, tied", world=8, tp=2, cp=2, pp=2, **SP, model="qwen2_tied"),
    Layout(
        name="TP2 SP PP2 VPP2 DP2, tied, overlapped",
        world=8,
        tp=2,
        pp=2,
        vpp=2,
        **SP,
        model="qwen2_tied",
        overlaps_reduction=True,
    ),
    Layout(name="CP4 TP2, llama3 rope", world=8, cp=4, tp=2, model="llama3_rope"),
    Layout(name="CP4 PP2", world=8, cp=4, pp=2),
    Layout(name="CP2 DP4, overlapped", world=8, cp=2, overlaps_reduction=True),
    Layout(name="PP4 VPP2 DP2", world=8, pp=4, vpp=2, model="qwen2_eight_layers"),
    Layout(
        name="CP2 PP4 VPP2, all recomputed",
        world=8,
        cp=2,
        pp=4,
        vpp=2,
        recompute="full",
        model="qwen2_eight_layers",
    ),
    Layout(name="TP4 SP PP2 over 2 key heads", world=8, tp=4, pp=2, **SP),
    Layout(name="TP4 DP2 over 2 key heads, definitions", world=8, tp=4, ops="reference"),
    Layout(
        name="PP4 DP2 of 3, 1, 1, 1, tied",
        world=8,
        pp=4,
        split=Split(first=3),
        model="qwen2_six_layers",
    ),
    Layout(
        name="CP2 PP4 of 1, 2, 2, 1, tied",
        world=8,
        cp=2,
        pp=4,
        split=COUNTS_ENDS,
        model="qwen2_six_layers",
    ),
    Layout(name="TP2 SP CP2 PP2 of 1, 3", world=8, tp=2, cp=2, pp=2, **SP, split=Split(first=1)),
)
MIXTURES = (
    Layout(name="EP8", world=8, ep=8, **EXPERTS),
    Layout(name="EP4 DP8", world=8, ep=4, model="mixtral"),
    Layout(name="EP2 DP8, overlapped", world=8, ep=2, overlaps_reduction=True, **EXPERTS),
    Layout(name="EP4 PP2", world=8, ep=4, pp=2, **EXPERTS),
    Layout(
        name="EP4 PP2 of 1, 3, mixed, tied",
        world=8,
        ep=4,
        pp=2,
        split=Split(first=1),
        model="qwen3_moe_mixed",
    ),
    Layout(
        name="EP2 PP2 VPP2 DP4, mixed, tied", world=8, ep=2, pp=2, vpp=2, model="qwen3_moe_mixed"
    ),
    Layout(name="TP2 SP EP2 PP2", world=8, tp=2, ep=2, pp=2, **SP, **EXPERTS),
    Layout(name="TP2 SP EP4 ETP1 DP4", world=8, tp=2, ep=4, expert_tp=1, **SP, **EXPERTS),
    Layout(name="TP2 SP CP2 EP2 DP2", world=8, tp=2, cp=2, ep=2, **SP, **EXPERTS),
    Layout(name="CP4 EP8", world=8, cp=4, ep=8, **EXPERTS),
    Layout(name="CP2 EP4 PP2, tied", world=8, cp=2, ep=4, pp=2, model="qwen3_moe_mixed"),
    Layout(name="TP4 SP EP2 ETP4", world=8, tp=4, ep=2, **SP, **EXPERTS),
    Layout(name="TP2 SP ETP1 DP4, EP1", world=8, tp=2, expert_tp=1, **SP, **EXPERTS, **FAULTY),
    Layout(
        name="TP2 SP CP2 ETP1, EP1", world=4, tp=2, cp=2, expert_tp=1, **SP, **EXPERTS, **FAULTY
    ),
)
DAILY = ("TP2 SP CP2 DP2", "TP2 SP EP2 PP2")
WIDE_LAYOUTS = tuple(
    replace(layout, takes_turns=True, is_daily=layout.name in DAILY)
    for layout in (*ODD_SIZES, *DENSE, *MIXTURES)
)
