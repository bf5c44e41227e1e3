"""Modules of transformers wholly in float64: its own compute in float32 whatever the dtype."""

from collections.abc import Callable
from typing import Any

import torch
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
        if type(module).__name__.startswith("Qwen3_5"):
            return F.rms_norm(hidden, hidden.shape[-1:], 1 + module.weight, module.eps)
        return F.rms_norm(hidden, hidden.shape[-1:], module.weight, module.variance_epsilon)

    return forward


def float64_delta_net(module: Any) -> Callable[..., Tensor]:
    """The gated delta net of one sequence as it is defined, token by token."""

    def forward(hidden_states: Tensor, **_: object) -> Tensor:
        (hidden,) = hidden_states
        behind = F.pad(module.in_proj_qkv(hidden), (0, 0, module.conv_kernel_size - 1, 0))
        seen = behind.unfold(0, module.conv_kernel_size, 1)  # [T, rows, kernel]
        mixed = F.silu((seen * module.conv1d.weight[:, 0]).sum(-1))
        mixed = mixed.split([module.key_dim, module.key_dim, module.value_dim], -1)
        heads, keys = module.num_v_heads, module.num_k_heads
        query, key = (_of_length_one(x.unflatten(-1, (keys, -1))) for x in mixed[:2])
        query, key = (x[:, torch.arange(heads) // (heads // keys)] for x in (query, key))
        value = mixed[2].unflatten(-1, (heads, -1))
        share = module.in_proj_b(hidden).sigmoid()
        decay = module.A_log.exp() * F.softplus(module.in_proj_a(hidden) + module.dt_bias)
        state = hidden.new_zeros(heads, module.head_k_dim, module.head_v_dim)
        outputs = []
        for t in range(len(hidden)):
            state = (-decay[t]).exp()[:, None, None] * state
            known = torch.einsum("hk,hkv->hv", key[t], state)
            learnt = share[t, :, None] * (value[t] - known)
            state = state + torch.einsum("hk,hv->hkv", key[t], learnt)
            outputs.append(torch.einsum("hk,hkv->hv", query[t], state))
        out = torch.stack(outputs) / module.head_k_dim**0.5
        gate = module.in_proj_z(hidden).unflatten(-1, (heads, -1))
        norm = module.norm
        normed = F.rms_norm(out, out.shape[-1:], norm.weight, norm.variance_epsilon)
        return module.out_proj((normed * F.silu(gate)).flatten(1))[None]

    return forward


def _of_length_one(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


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
