"""What routers of a policy on ranks did with an update, beside the answer; and how exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from layout import Layout
from reference import Answer
from router_reference import Auxiliary
from torch import Tensor

from megatron_rl.policy.policy import Policy


@contextmanager
def routers_in_own_dtype() -> Iterator[None]:
    """Megatron-Core's routers ask for float32, which would limit a comparison to 1e-7."""
    to_float32 = Tensor.float

    def softmax(values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return F.softmax(values, dim=dim, dtype=None if values.dtype == torch.float64 else dtype)

    def unless_float64(values: Tensor) -> Tensor:
        return values if values.dtype == torch.float64 else to_float32(values)

    with mock.patch("torch.softmax", softmax), mock.patch.object(Tensor, "float", unless_float64):
        yield


def bias_changes(
    policy: Policy, before: dict[str, Tensor], answer: Answer, layout: Layout
) -> tuple[float, int]:
    """(largest error, entries that moved) of the biases of routers after an update."""
    rate = dict(layout.megatron).get("moe_router_bias_update_rate", 0.0)
    after, found = policy.named_parameters(), torch.zeros(2, dtype=torch.float64)
    mixtures = [n for n in range(policy.arch.num_layers) if policy.arch.has_experts(n)]
    for piece in policy.pieces:
        if piece.param.endswith("expert_bias"):
            chosen = answer.chosen[mixtures.index(int(piece.hf.split(".")[2]))]
            step = (rate * torch.sign(chosen.mean() - chosen)).to(torch.float32)
            error = (after[piece.param] - (before[piece.param] + step)).abs().max().double()
            moved = (after[piece.param] != before[piece.param]).sum()
            found = torch.stack([found[0].maximum(error), found[1] + moved])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found[0].item(), int(found[1])


def auxiliary_error(
    metrics: dict[str, float], answer: Answer, auxiliary: Auxiliary | None
) -> float:
    wanted = {} if auxiliary is None else {"load_balancing_loss": answer.balance}
    if auxiliary is not None and auxiliary.z:
        wanted["router_z_loss"] = answer.z
    names = {name for name in metrics if "load_balancing" in name or "router_z" in name}
    assert names == {f"policy/{name}" for name in wanted}
    return max([0.0, *(abs(metrics[f"policy/{name}"] / v - 1) for name, v in wanted.items())])
