"""The native ops against their definitions in float64, on the device that a run would use."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_rl.doctor.check import Result, failed, not_there, ok
from megatron_rl.doctor.versions import build_command
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.token_loss import linear_policy_loss
from megatron_rl.ops import backend, native
from megatron_rl.ops.config import Backend
from megatron_rl.ops.group_stats import KeepRule, group_stats
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.vocab_parallel import Shard
from megatron_rl.platforms.base import detect
from megatron_rl.types import LossTokens

ROWS, VOCAB = 7, 1003
DTYPES = (torch.float32, torch.bfloat16)
ROUNDED = (3e-5, 1e-5)  # absolute and relative, of float32 sums over a vocabulary
EXACT = (1e-12, 1e-12)  # of float64


def check_native_ops() -> Result:
    device = detect().current_device()
    if not native.has("row_stats", device):
        why = native.FAULT or f"the extension was compiled without {device.type}"
        return not_there(f"PyTorch definitions are used instead: {why}", build_command())
    wrong = [name for name, is_right in _comparisons(device) if not is_right]
    if wrong:
        found = f"on {device.type}, other results than by the definition: {', '.join(wrong)}"
        return failed(found, f"{build_command()}  # or give a run ops.backend=reference")
    dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return ok(f"on {device.type} as by the definitions, in {dtypes}")


def _comparisons(device: torch.device) -> Iterator[tuple[str, bool]]:
    """What is compared, and whether it is right."""
    for dtype in DTYPES:
        logits, tokens = _problem(dtype)
        for what, compute in (("loss", _loss), ("log-probs", _logprobs)):
            *found, gradient = compute(logits.to(device), tokens, "native")
            *defined, exact = compute(logits.double(), tokens, "reference")
            name = f"{what} in {str(dtype).removeprefix('torch.')}"
            yield name, _are_close(found, defined, ROUNDED)
            yield f"gradient of {name}", _is_rounded_once(gradient, exact, dtype)
    rewards = torch.tensor([1.0, -1.0, 0.5, -1.0, -1.0, 0.25], dtype=torch.float64)
    groups, defined_groups = _groups(rewards.to(device), "native"), _groups(rewards, "reference")
    yield "statistics of groups", _are_close(groups, defined_groups, EXACT)


def _problem(dtype: torch.dtype) -> tuple[Tensor, LossTokens]:
    """Logits and tokens whose ratios fall on both sides of the clip."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = (3 * normal(ROWS, VOCAB)).to(dtype)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    logprobs = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logits, LossTokens(
        at=torch.arange(ROWS),
        targets=targets,
        old_logprobs=logprobs + 0.4 * normal(ROWS),
        ref_logprobs=logprobs + 0.4 * normal(ROWS),
        rollout_logprobs=logprobs + 0.4 * normal(ROWS),
        advantages=normal(ROWS),
        weights=normal(ROWS).abs() / ROWS,
    )


def _loss(logits: Tensor, tokens: LossTokens, by: Backend) -> tuple[Tensor, ...]:
    """Log-probs, sums, and the gradient of the logits."""
    terms = SharedTerms(kl_coef=0.1, entropy_coef=0.05)
    with _Backend(by, logits.device):
        head = _head(logits)
        on_device = tokens.to(logits.device)
        result = linear_policy_loss(head, on_device, ClippedRatio(eps_high=0.28), terms)
        result.loss.backward()
    return result.logprobs, result.sums, _gradient(head)


def _logprobs(logits: Tensor, tokens: LossTokens, by: Backend) -> tuple[Tensor, ...]:
    """Log-probs, and the gradient of the logits."""
    with _Backend(by, logits.device):
        head = _head(logits)
        logprobs, entropy = linear_logprobs(head, tokens.targets.to(logits.device))
        (logprobs + 0.5 * entropy).sum().backward()
    return logprobs.detach(), _gradient(head)


def _groups(rewards: Tensor, by: Backend) -> tuple[Tensor, ...]:
    """Standard deviations, what is kept, and advantages, of groups of three, two and one."""
    offsets = torch.tensor([0, 3, 5, 6], device=rewards.device)
    keep: tuple[KeepRule, ...] = ("drop_uniform",)
    with _Backend(by, rewards.device):
        found = group_stats(rewards, offsets, keep=keep, advantage="group_norm")
    return found.std, found.keep, found.advantages


class _Backend:
    """A context in which one implementation of the ops runs."""

    def __init__(self, backend_: Backend, device: torch.device) -> None:
        self._backend, self._device = backend_, device

    def __enter__(self) -> None:
        self._before = backend.chosen()
        backend.choose(self._backend, self._device)

    def __exit__(self, *_error: object) -> None:
        backend.choose(self._before, self._device)


def _head(logits: Tensor) -> Head:
    """A head whose logits are exactly these: its hidden states are the unit vectors."""
    return Head(
        hidden=torch.eye(len(logits), dtype=logits.dtype, device=logits.device),
        head_weight=logits.T.detach().requires_grad_(),
        shard=Shard(None, 0, logits.size(1), 0.8),
    )


def _gradient(head: Head) -> Tensor:
    assert head.head_weight.grad is not None
    return head.head_weight.grad.T


def _are_close(
    found: Sequence[Tensor], defined: Sequence[Tensor], within: tuple[float, float]
) -> bool:
    return all(
        torch.allclose(one.cpu().double(), other.double(), atol=within[0], rtol=within[1])
        for one, other in zip(found, defined, strict=True)
    )


def _is_rounded_once(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    best = (exact.to(dtype).double() - exact).norm()
    error = (actual.cpu().double() - exact).norm()
    return bool(error <= 1.05 * best + 1e-5 * exact.norm())
