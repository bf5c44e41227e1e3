"""Modules of transformers wholly in float64: its own compute in float32 whatever the dtype."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def one_epsilon(model: Any) -> None:
    """Give norms of latent vectors rms_norm_eps, as Megatron-Core and vLLM do.

    transformers has 1e-6 there whatever config.json says.
    """
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = model.config.rms_norm_eps


def float64_norm(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)

    return forward


def float64_router(
    module: Any, reference: Any
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.reshape(-1, module.hidden_dim), module.weight)
        if hasattr(module, "e_score_correction_bias"):
            scores = logits.sigmoid()
            corrected = scores + module.e_score_correction_bias
            if getattr(module, "num_group", 1) > 1:
                corrected = of_best_groups(corrected, module.num_group, module.topk_group)
            experts = reference.choice(corrected.topk(module.top_k, dim=-1).indices)
            reference.note(logits, experts)
            chosen = scores.gather(-1, experts)
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
            return logits, chosen * module.routed_scaling_factor, experts
        experts = reference.choice(logits.topk(module.top_k, dim=-1).indices)
        reference.note(logits, experts)
        chosen = logits.softmax(-1).gather(-1, experts)
        if getattr(module, "norm_topk_prob", True):  # Mixtral always does
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return logits, chosen, experts

    return forward


def of_best_groups(scores: Tensor, groups: int, chosen: int) -> Tensor:
    """[T, E] scores, -inf outside of the groups whose two best experts have the largest sum."""
    grouped = scores.unflatten(1, (groups, -1))
    sums = grouped.sort(-1).values[..., -2:].sum(-1)
    least = sums.sort(-1).values[:, -chosen, None]
    return grouped.masked_fill((sums < least)[..., None], -float("inf")).flatten(1)
