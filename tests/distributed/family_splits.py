"""Ways to split models with stacked files, and models with norms behind their layers."""

from typing import Any

from layout import Layout

PHI4: dict[str, Any] = {"model": "phi4", "has_least": True}
PHI4_MINI: dict[str, Any] = {"model": "phi4_mini", "has_least": True}
OLMO2: dict[str, Any] = {"model": "olmo2", "has_least": True}
OLMO3: dict[str, Any] = {"model": "olmo3", "has_least": True}
ONE_WINDOW: dict[str, Any] = {"model": "mistral_window", "has_least": True}

FAMILY_LAYOUTS = (
    Layout(name="one rank, stacked, LongRoPE, tied", world=1, **PHI4_MINI),
    Layout(name="TP2, stacked", world=2, tp=2, **PHI4),
    Layout(name="TP2 SP, stacked, LongRoPE", world=2, tp=2, sequence_parallel=True, **PHI4_MINI),
    Layout(
        name="CP2, stacked, LongRoPE, all recomputed", world=2, cp=2, recompute="full", **PHI4_MINI
    ),
    Layout(name="PP2 VPP2, stacked, LongRoPE", world=2, pp=2, vpp=2, **PHI4_MINI),
    Layout(name="one rank, stacked, shared prompts", world=1, shares_prompts=True, **PHI4),
    Layout(name="TP4 SP over 2 key heads, stacked", world=4, tp=4, sequence_parallel=True, **PHI4),
    Layout(
        name="TP2 SP PP2, stacked, LongRoPE, overlapped",
        world=4,
        tp=2,
        pp=2,
        sequence_parallel=True,
        overlaps_reduction=True,
        is_daily=False,
        **PHI4_MINI,
    ),
    Layout(name="one rank, norms behind", world=1, **OLMO2),
    Layout(name="one rank, norms behind, shared prompts", world=1, shares_prompts=True, **OLMO2),
    Layout(name="TP2, norms behind", world=2, tp=2, **OLMO2),
    Layout(name="TP2 SP, norms behind", world=2, tp=2, sequence_parallel=True, **OLMO2),
    Layout(name="CP2, norms behind, all recomputed", world=2, cp=2, recompute="full", **OLMO2),
    Layout(name="PP2 VPP2, norms behind", world=2, pp=2, vpp=2, **OLMO2),
    Layout(
        name="TP2 SP PP2, norms behind, attention recomputed",
        world=4,
        tp=2,
        pp=2,
        sequence_parallel=True,
        recompute="selective",
        **OLMO2,
    ),
    Layout(
        name="TP2 CP2, norms behind",
        world=4,
        tp=2,
        cp=2,
        is_daily=False,
        **OLMO2,
    ),
    Layout(name="one rank, windows", world=1, **OLMO3),
    Layout(name="one rank, windows, shared prompts", world=1, shares_prompts=True, **OLMO3),
    Layout(name="TP2, windows", world=2, tp=2, is_daily=False, **OLMO3),
    Layout(name="TP2 SP, windows", world=2, tp=2, sequence_parallel=True, **OLMO3),
    Layout(name="CP2, windows, all recomputed", world=2, cp=2, recompute="full", **OLMO3),
    Layout(name="PP2 VPP2, windows", world=2, pp=2, vpp=2, is_daily=False, **OLMO3),
    Layout(
        name="TP2 SP PP2, windows, attention recomputed",
        world=4,
        tp=2,
        pp=2,
        sequence_parallel=True,
        recompute="selective",
        **OLMO3,
    ),
    Layout(
        name="TP2 CP2, windows",
        world=4,
        tp=2,
        cp=2,
        is_daily=False,
        **OLMO3,
    ),
    Layout(name="one rank, one window, shared prompts", world=1, shares_prompts=True, **ONE_WINDOW),
    Layout(
        name="TP2 SP, one window",
        world=2,
        tp=2,
        sequence_parallel=True,
        is_daily=False,
        **ONE_WINDOW,
    ),
)
