"""What others compute the same, or part of the same, with."""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Providers = dict[str, Callable[[], Tensor]]


def clipped_loss(
    logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor
) -> Tensor:
    """The formula as most trainers write it."""
    logprobs = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ratio = (logprobs - old_logprobs).exp()
    gains = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(gains * weights).sum()


def loss_peers(p: Any, *, compiles: bool) -> Providers:
    """Name -> call that returns the gradient of the logits."""

    def with_gradient(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = p.work.detach().requires_grad_()
        loss_of(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    def with_loss(loss: Callable[..., Tensor]) -> Tensor:
        return with_gradient(lambda x: loss(x, p.targets, p.old_logprobs, p.advantages, p.weights))

    providers: Providers = {"naive formula": lambda: with_loss(clipped_loss)}
    if compiles:
        compiled = torch.compile(clipped_loss)
        providers["torch.compile of it"] = lambda: with_loss(compiled)
    providers["F.cross_entropy (cross entropy only)"] = lambda: with_gradient(
        lambda x: F.cross_entropy(x.float(), p.targets)
    )
    megatron = megatron_cross_entropy(p.work.device.type)
    providers["Megatron-Core vocab-parallel cross entropy"] = lambda: with_gradient(
        lambda x: megatron(x[:, None], p.targets[:, None]).mean()
    )
    if p.work.is_cuda and importlib.util.find_spec("liger_kernel"):
        providers["Liger GRPO loss, in place"] = lambda: liger_grpo(p)
    return providers


def head_peers(p: Any) -> Providers:
    """Name -> call that returns the gradient of the hidden states; the head's is computed too."""

    def naive() -> Tensor:
        hidden = p.hidden.detach().requires_grad_()
        weight = p.weight.detach().requires_grad_()
        logits = hidden @ weight.T
        clipped_loss(logits, p.targets, p.old_logprobs, p.advantages, p.weights).backward()
        assert hidden.grad is not None
        return hidden.grad

    providers: Providers = {"naive, whole logits": naive}
    fused = liger_fused_linear(p)
    if fused is not None:
        providers["Liger fused linear GRPO"] = fused
    return providers


def megatron_cross_entropy(device_type: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Megatron-Core's, at one tensor-parallel rank."""
    from megatron_rl.megatron.enter import enter
    from megatron_rl.platforms import base

    enter({"cpu": base.CPU, "cuda": base.CUDA}[device_type])
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
        parallel_state.initialize_model_parallel()
    # Its gradient is computed where its softmax is kept, and it overwrites float32 logits.
    return lambda logits, targets: vocab_parallel_cross_entropy(logits.clone(), targets)


def liger_grpo(p: Any) -> Tensor:
    """One padded sequence; it wants a column of logits for the token after the last one."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    leaf = p.work[None].detach().requires_grad_()
    padded = torch.cat([leaf, leaf[:, -1:]], dim=1)
    losses, *_ = triton_grpo_loss(
        padded,
        p.old_logprobs[None],
        None,
        p.targets[None],
        p.advantages.mean()[None],
        None,
        1.0,
        0.0,
        0.2,
        0.2,
        True,
    )
    losses.sum().backward()
    assert leaf.grad is not None
    return leaf.grad[0]


def liger_fused_linear(p: Any) -> Callable[[], Tensor] | None:
    """Liger's fused linear GRPO loss, or None where it is not installed or does not run."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None

    def run() -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)
        hidden = p.hidden.detach()[None].requires_grad_()
        weight = p.weight.detach().requires_grad_()
        result = loss(
            hidden,
            weight,
            p.targets[None],
            torch.ones_like(p.targets)[None],
            p.advantages.mean()[None],
            old_per_token_logps=p.old_logprobs[None],
        )
        result[0].backward()
        assert hidden.grad is not None
        return hidden.grad[0]

    try:
        run()
    except Exception as error:
        sys.stderr.write(
            f"Liger's fused linear GRPO is left out: {type(error).__name__}: {error}\n"
        )
        return None
    return run
