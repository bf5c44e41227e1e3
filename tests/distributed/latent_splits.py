"""Ways to split models with latent attention."""

from typing import Any

from layout import Layout

from megatron_rl.parallel.stages import Split

MOVING = (("moe_router_bias_update_rate", 0.01),)  # biases of routers
DEEPSEEK: dict[str, Any] = {"model": "deepseek_v3", "has_least": True}
MOONLIGHT: dict[str, Any] = {"model": "moonlight", "has_least": True}
SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}

LATENT_LAYOUTS = (
    Layout(name="one rank, latent", world=1, **DEEPSEEK),
    Layout(name="one rank, latent keys alone", world=1, **MOONLIGHT),
    Layout(name="TP2 SP, latent", world=2, **SP, **DEEPSEEK, megatron=MOVING),
    Layout(name="TP2 SP, latent keys alone", world=2, **SP, **MOONLIGHT, megatron=MOVING),
    Layout(
        name="TP2 SP, latent, values as wide as keys",
        world=2,
        **SP,
        model="glm4_moe_lite",
        has_least=True,
        is_daily=False,
    ),
    Layout(
        name="CP2 EP2, latent, all recomputed", world=2, cp=2, ep=2, recompute="full", **DEEPSEEK
    ),
    Layout(
        name="PP2 of 1, 3, latent, attention recomputed",
        world=2,
        pp=2,
        split=Split(first=1),
        recompute="selective",
        **DEEPSEEK,
        megatron=MOVING,
    ),
    Layout(name="PP2 VPP2, latent", world=2, pp=2, vpp=2, **DEEPSEEK, is_daily=False),
    Layout(name="one rank, latent, shared prompts", world=1, shares_prompts=True, **DEEPSEEK),
    Layout(
        name="TP2 SP EP4 ETP1, latent",
        world=4,
        ep=4,
        expert_tp=1,
        **SP,
        **DEEPSEEK,
        megatron=MOVING,
    ),
    Layout(
        name="TP4 SP EP2 ETP2, latent keys alone",
        world=4,
        tp=4,
        ep=2,
        expert_tp=2,
        sequence_parallel=True,
        **MOONLIGHT,
        is_daily=False,
    ),
    Layout(name="TP2 SP CP2, latent", world=4, cp=2, **SP, **DEEPSEEK, is_daily=False),
    Layout(
        name="DP4 EP2, latent, overlapped",
        world=4,
        ep=2,
        **DEEPSEEK,
        megatron=MOVING,
        overlaps_reduction=True,
        is_daily=False,
    ),
)
