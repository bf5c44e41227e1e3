"""Auxiliary losses of routers by their definitions, in float64, one sequence at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Routed = tuple[Tensor, Tensor]  # of a router: its logits [T, E], the experts chosen [T, K]


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """Auxiliary losses of routers: over what experts are balanced, and the coefficients."""

    over: str | None = None  # "sequence" or "update"
    balance: float = 0.0
    z: float = 0.0


def auxiliary_losses(routed: Sequence[Sequence[Routed]], over: str | None) -> tuple[Tensor, Tensor]:
    """(balance, z) as means over layers, of what routers did with sequences, layer by layer."""
    balance, z = [], []
    for of_layer in zip(*routed, strict=True):
        tokens = sum(len(logits) for logits, _ in of_layer)
        z.append(sum(logits.logsumexp(-1).square().sum() for logits, _ in of_layer) / tokens)
        whole = [tuple(map(torch.cat, zip(*of_layer, strict=True)))]
        terms = []
        for logits, experts in whole if over == "update" else of_layer:
            probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
            chosen = torch.zeros_like(probs).scatter(1, experts, 1.0).mean(0) / experts.shape[1]
            evenness = (chosen * probs.mean(0)).sum() * probs.shape[1]
            terms.append(evenness * len(logits) / tokens)
        balance.append(sum(terms))
    return torch.stack(balance).mean(), torch.stack(z).mean()


def chosen_experts(routed: Sequence[Sequence[Routed]]) -> Tensor:
    """[L, E] how often each expert was chosen, of what routers did with sequences."""
    return torch.stack(
        [
            sum(
                experts.flatten().bincount(minlength=logits.shape[1]).double()
                for logits, experts in of_layer
            )
            for of_layer in zip(*routed, strict=True)
        ]
    )
