"""The loss of every algorithm, from per-token log-probabilities: one formula, one weight a token.

loss = sum_t weight_t * (is_t * L_pg + kl_coef * KL_t - entropy_coef * H_t)
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rl.ops import backend
from megatron_rl.ops.native_loss import LossInputs, TokenLossFunction

LossKind = Literal["likelihood", "clipped_ratio"]
KlEstimator = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Differences of log-probabilities are clamped to this before exp(); no gradient outside."""

NATIVE_DTYPES = (torch.float32, torch.float64)
"""Of log-probabilities that the native loss takes."""

SUMS = (
    "tokens",  # with weight != 0; the only ones that any entry below speaks about
    "clip_low",
    "clip_high",
    "dual_clip",
    "ratio_tokens",  # tokens whose ratio is known
    "ratio",
    "kl_old_k1",  # of KL(old || current)
    "kl_old_k3",
    "entropy_tokens",
    "entropy",
    "ref_tokens",
    "kl_ref_k1",  # of KL(current || ref)
    "kl_ref_k3",
    "rollout_tokens",
    "gap",  # old - rollout
    "abs_gap",
    "gap_k3",  # of KL(rollout || old)
    "loss",  # weight * (all terms)
)
"""Order of TokenLoss.sums: to be added over micro-batches and data-parallel ranks."""

EXTREMA = ("ratio", "abs_gap")
"""Order of TokenLoss.extrema: largest values, 0 where not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """The numbers of a loss."""

    kind: LossKind
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None  # > 1; bounds the loss of tokens with negative advantage
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    rollout_is_cap: float | None = None  # weights exp(old - rollout) up to this; None: no weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenLoss:
    """A loss and what it measured on the way."""

    loss: Tensor  # [], with gradient, in the dtype of logprobs
    sums: Tensor  # [len(SUMS)] float64, detached
    extrema: Tensor  # [len(EXTREMA)] float64, detached


def token_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    spec: LossSpec,
) -> TokenLoss:
    """Weighted loss of N tokens and its metrics; all tensors are [N].

    A token of weight 0 has no gradient and no part in the metrics, whatever its other entries.

    Args:
        logprobs: current, with gradient; its dtype is what everything is computed in.
        entropy: with gradient if spec.entropy_coef is not 0, else only measured.
        old_logprobs: None means the current ones, detached: every ratio is exactly 1.
        ref_logprobs: only measured if spec.kl_coef is 0.
        rollout_logprobs: only measured if spec.rollout_is_cap is None.
        advantages: constants.
        weights: shares of the global loss; nothing divides after this.
        spec: kind of loss and its numbers.
    """
    check_inputs(spec, entropy=entropy, ref=ref_logprobs, rollout=rollout_logprobs)
    if logprobs.dtype in NATIVE_DTYPES and backend.is_native("token_loss", logprobs):
        inputs = LossInputs(
            old_logprobs, ref_logprobs, rollout_logprobs, advantages, weights, spec,
            with_entropy=entropy is not None,
        )  # fmt: skip
        loss, _, sums, extrema = TokenLossFunction.apply(logprobs, entropy, inputs)
        return TokenLoss(loss=loss, sums=sums, extrema=extrema)
    return token_loss_definition(
        logprobs,
        entropy,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        weights=weights,
        spec=spec,
    )


def token_loss_definition(
    logprobs: Tensor,
    entropy: Tensor | None,
    *,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    spec: LossSpec,
) -> TokenLoss:
    """What the native op must equal, and what runs where there is none."""
    active = weights != 0
    has_ratio = spec.kind == "clipped_ratio" or old_logprobs is not None
    logprobs = logprobs.where(active, 0.0)
    entropy = None if entropy is None else entropy.where(active, 0.0)
    old = logprobs.detach() if old_logprobs is None else _constant(old_logprobs, logprobs, active)
    ref = None if ref_logprobs is None else _constant(ref_logprobs, logprobs, active)
    rollout = None if rollout_logprobs is None else _constant(rollout_logprobs, logprobs, active)
    advantages = _constant(advantages, logprobs, active)
    weights = weights.detach().to(logprobs.dtype)

    ratio = bounded_exp(logprobs - old)
    if spec.kind == "likelihood":
        no_clip = torch.zeros_like(active)
        terms, flags = -advantages * logprobs, ClipFlags(no_clip, no_clip, no_clip)
    else:
        terms, flags = clipped_ratio_loss(ratio, advantages, spec)
    if spec.rollout_is_cap is not None and rollout is not None:
        terms = terms * bounded_exp(old - rollout).clamp(max=spec.rollout_is_cap)
    if spec.kl_coef != 0 and ref is not None:
        terms = terms + spec.kl_coef * kl_estimate(logprobs, ref, spec.kl_estimator)
    if spec.entropy_coef != 0 and entropy is not None:
        terms = terms - spec.entropy_coef * entropy
    loss = (weights * terms).sum()

    meter = _Meter(active)
    with torch.no_grad():
        meter.add("tokens", torch.ones_like(logprobs))
        meter.add("loss", weights * terms)
        if has_ratio:
            _measure_ratio(meter, logprobs, old, ratio, flags)
        if entropy is not None:
            meter.add("entropy_tokens", torch.ones_like(entropy))
            meter.add("entropy", entropy)
        if ref is not None:
            meter.add("ref_tokens", torch.ones_like(ref))
            meter.add("kl_ref_k1", logprobs - ref)
            meter.add("kl_ref_k3", k3(ref - logprobs))
        if rollout is not None:
            _measure_gap(meter, old - rollout)
    return TokenLoss(loss=loss, sums=meter.sums, extrema=meter.extrema)


@dataclass(frozen=True, slots=True)
class ClipFlags:
    """Which tokens a bound stopped, each [N] bool."""

    low: Tensor
    high: Tensor
    dual: Tensor


def clipped_ratio_loss(
    ratio: Tensor, advantages: Tensor, spec: LossSpec
) -> tuple[Tensor, ClipFlags]:
    """-min(s * A, clip(s) * A) of each token, at most -dual_clip * A where A < 0.

    Written by cases, so that the gradient is exactly that of the case.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; Ye et al. 2019, arXiv:1912.09729, eq. 5.
    """
    high = (advantages > 0) & (ratio > 1 + spec.eps_high)
    low = (advantages < 0) & (ratio < 1 - spec.eps_low)
    dual = torch.zeros_like(low)
    bounded = ratio
    bounded = torch.where(high, 1 + spec.eps_high, bounded)
    bounded = torch.where(low, 1 - spec.eps_low, bounded)
    if spec.dual_clip is not None:
        dual = (advantages < 0) & (ratio > spec.dual_clip)
        bounded = torch.where(dual, spec.dual_clip, bounded)
    return -bounded * advantages, ClipFlags(low, high, dual)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate of KL(current || ref) from each sampled token, with gradient.

    Source: Schulman, "Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return k3(-log_ratio)


def k3(d: Tensor) -> Tensor:
    """exp(d) - 1 - d, which is never negative, d clamped to MAX_LOG_RATIO either way.

    Near 0 the difference would cancel to noise; there it is the Taylor series.
    """
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    is_small = d.abs() < 0.03
    x = d.where(is_small, 0.0)
    series = torch.full_like(x, 1 / 40320)
    for factorial in (5040, 720, 120, 24, 6, 2):  # to x^8: the rest is under 1e-16 of the sum
        series = series * x + 1 / factorial
    return torch.where(is_small, x * x * series, torch.expm1(d) - d)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp() of a difference of log-probabilities that no outlier token can overflow."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def metrics_from(sums: Tensor, extrema: Tensor) -> dict[str, float]:
    """Named metrics of accumulated sums and extrema, without those that were not measured.

    Cost: two copies to the host.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    largest = dict(zip(EXTREMA, extrema.tolist(), strict=True))
    metrics = {"policy/loss": total["loss"], "policy/trained_tokens": total["tokens"]}
    if num := total["ratio_tokens"]:
        metrics["policy/clip_low_frac"] = total["clip_low"] / num
        metrics["policy/clip_high_frac"] = total["clip_high"] / num
        metrics["policy/dual_clip_frac"] = total["dual_clip"] / num
        metrics["policy/ratio_mean"] = total["ratio"] / num
        metrics["policy/ratio_max"] = largest["ratio"]
        metrics["policy/kl_old_k1"] = total["kl_old_k1"] / num
        metrics["policy/kl_old_k3"] = total["kl_old_k3"] / num
    if num := total["entropy_tokens"]:
        metrics["policy/entropy_mean"] = total["entropy"] / num
    if num := total["ref_tokens"]:
        metrics["policy/kl_ref_k1"] = total["kl_ref_k1"] / num
        metrics["policy/kl_ref_k3"] = total["kl_ref_k3"] / num
    if num := total["rollout_tokens"]:
        metrics["rollout/logprob_gap_mean"] = total["abs_gap"] / num
        metrics["rollout/logprob_gap_max"] = largest["abs_gap"]
        metrics["rollout/logprob_gap_k3"] = total["gap_k3"] / num
    return metrics


class _Meter:
    """Accumulators of one call, in float64: float32 counts wrong from 16 million tokens on."""

    def __init__(self, active: Tensor) -> None:
        self._active = active
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=active.device)
        self.extrema = torch.zeros(len(EXTREMA), dtype=torch.float64, device=active.device)

    def add(self, name: str, values: Tensor) -> None:
        self.sums[SUMS.index(name)] = values.double().where(self._active, 0.0).sum()

    def largest(self, name: str, values: Tensor) -> None:
        if values.numel() > 0:
            self.extrema[EXTREMA.index(name)] = values.double().where(self._active, 0.0).amax()


def _measure_ratio(
    meter: _Meter, logprobs: Tensor, old: Tensor, ratio: Tensor, flags: ClipFlags
) -> None:
    meter.add("clip_low", flags.low)
    meter.add("clip_high", flags.high)
    meter.add("dual_clip", flags.dual)
    meter.add("ratio_tokens", torch.ones_like(ratio))
    meter.add("ratio", ratio)
    meter.largest("ratio", ratio)
    meter.add("kl_old_k1", old - logprobs)
    meter.add("kl_old_k3", k3(logprobs - old))


def _measure_gap(meter: _Meter, gap: Tensor) -> None:
    meter.add("rollout_tokens", torch.ones_like(gap))
    meter.add("gap", gap)
    meter.add("abs_gap", gap.abs())
    meter.largest("abs_gap", gap.abs())
    meter.add("gap_k3", k3(gap))


def _constant(values: Tensor, like: Tensor, active: Tensor) -> Tensor:
    return values.detach().to(like.dtype).where(active, 0.0)


def check_inputs(
    spec: LossSpec, *, entropy: Tensor | None, ref: Tensor | None, rollout: Tensor | None
) -> None:
    """Raise ValueError where the loss needs something that is None."""
    for name, setting, needed, given in (
        ("entropy", "entropy_coef", spec.entropy_coef != 0, entropy),
        ("ref_logprobs", "kl_coef", spec.kl_coef != 0, ref),
        ("rollout_logprobs", "rollout_is_cap", spec.rollout_is_cap is not None, rollout),
    ):
        if needed and given is None:
            raise ValueError(
                f"{setting}={getattr(spec, setting)}: needs {name}, got None; measure {name} first"
            )
