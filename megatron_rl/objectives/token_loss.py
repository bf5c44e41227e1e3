"""The loss of tokens: an objective's own term of each, with the terms that all of them share.

loss = sum_t weight_t * (c_t * own_t + kl_coef * KL_t - entropy_coef * H_t)

c_t corrects for the engine having sampled from slightly other probabilities than the trainer's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rl.objectives.objective import ClipFlags, TokenObjective
from megatron_rl.ops import backend
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import (
    EXTREMA,
    MAX_LOG_RATIO,
    SUMS,
    Correction,
    KlEstimator,
    MeasuredLoss,
    SharedTerms,
)
from megatron_rl.ops.native_loss import native_policy_loss
from megatron_rl.types import LossTokens


def linear_policy_loss(
    head: Head,
    tokens: LossTokens,
    objective: TokenObjective,
    shared: SharedTerms,
    *,
    responses: Tensor | None = None,
    chunk_rows: int | None = None,
) -> MeasuredLoss:
    """Loss of N tokens by the compiled ops or by the definition, which only this function decides.

    The loss is equal on all tp ranks. Zero tokens give a loss of 0 that is connected to hidden and
    head_weight, with gradients of 0. Gradients and chunk_rows: as in linear_logprobs.
    """
    _check_inputs(tokens, shared)
    native, hidden = objective.native, head.hidden
    if (
        native is not None
        and not shared.needs_responses
        and backend.is_native("policy_loss_onepass_", hidden)
        and hidden.dtype == head.head_weight.dtype
    ):
        return native_policy_loss(head, tokens, native, shared, chunk_rows=chunk_rows)
    logprobs, entropy = linear_logprobs(head, tokens.targets, chunk_rows=chunk_rows)
    return token_loss(logprobs, entropy, tokens, objective, shared, responses)


def token_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: LossTokens,
    objective: TokenObjective,
    shared: SharedTerms,
    responses: Tensor | None = None,
) -> MeasuredLoss:
    """Weighted loss of N tokens and its metrics: the native ops must equal it.

    A token of weight 0 has no gradient and no part in the metrics, whatever its other entries.

    Args:
        logprobs: [N] current, with gradient; its dtype is what everything is computed in.
        entropy: [N] with gradient if shared.entropy_coef is not 0, else only measured.
        tokens: ref_logprobs are only measured if shared.kl_coef is 0, and rollout_logprobs if
            shared.correction is None.
        objective: gives the own term.
        shared: the numbers of the other terms.
        responses: int64 lengths of the responses whose tokens these are, in their order; needed
            where the objective's ratio, or the correction, is that of a response.
    """
    _check_inputs(tokens, shared)
    active = tokens.weights != 0
    has_ratio = objective.has_ratio or tokens.old_logprobs is not None
    logprobs = logprobs.where(active, 0.0)
    entropy = None if entropy is None else entropy.where(active, 0.0)
    old = _constant(tokens.old_logprobs, logprobs, active)
    old = logprobs.detach() if old is None else old
    ref = _constant(tokens.ref_logprobs, logprobs, active)
    rollout = _constant(tokens.rollout_logprobs, logprobs, active)
    advantages = tokens.advantages.detach().to(logprobs.dtype).where(active, 0.0)
    weights = tokens.weights.detach().to(logprobs.dtype)

    log_ratio = logprobs - old
    if objective.ratio_of == "response":
        assert responses is not None
        log_ratio = _MeanOfResponse.apply(log_ratio, responses)
    ratio = bounded_exp(log_ratio)
    terms, flags = objective.own_terms(logprobs, ratio, advantages)
    correction = None
    if shared.correction is not None and rollout is not None:
        correction = corrections(old - rollout, shared.correction, responses)
        terms = terms * correction.weights
    if shared.kl_coef != 0 and ref is not None:
        terms = terms + shared.kl_coef * kl_estimate(logprobs, ref, shared.kl_estimator)
    if shared.entropy_coef != 0:
        if entropy is None:
            raise _missing("entropy", "entropy_coef", shared)
        terms = terms - shared.entropy_coef * entropy
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
            _measure_kl(meter, logprobs, ref)
        if rollout is not None:
            _measure_gap(meter, old - rollout)
        if correction is not None:
            _measure_corrections(meter, correction)
    return MeasuredLoss(loss, logprobs.detach(), meter.sums, meter.extrema)


class Corrections(NamedTuple):
    """What own terms are weighed by, since trainer and engine differ; constants."""

    weights: Tensor  # [N]
    is_bounded: Tensor  # [N] bool: a bound has cut the weight, or set it to 0


def corrections(
    log_ratio: Tensor, correction: Correction, responses: Tensor | None = None
) -> Corrections:
    """Weights of N tokens from log_ratio [N] = old - rollout.

    Source: truncated importance sampling, Ionides 2008, doi:10.1198/106186008X320456; levels and
    modes as in verl's rollout correction.
    """
    if correction.level != "token":
        assert responses is not None
        log_ratio = _of_response(log_ratio, responses, _REDUCTIONS[correction.level])
    ratio = bounded_exp(log_ratio)
    weights = ratio.clamp(correction.low, correction.high)
    is_bounded = weights != ratio
    if correction.mode == "mask":
        weights = weights.masked_fill(is_bounded, 0.0)
    return Corrections(weights, is_bounded)


_REDUCTIONS = {"sequence": "sum", "geometric": "mean"}


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """[N] estimates of KL(current || ref), one from each sampled token [N], with gradient.

    Source: Schulman, "Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return k3(-log_ratio)


def k3(d: Tensor) -> Tensor:
    """[N] exp(d) - 1 - d, which is never negative, d [N] clamped to MAX_LOG_RATIO either way.

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
    """[N] exp() of differences of log-probabilities, which no outlier token can overflow."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class _MeanOfResponse(torch.autograd.Function):
    """[N] mean of [N] values over the tokens of the same response, given the lengths of responses.

    Its matrix is symmetric, so the backward is the same; none of it depends on an order of threads.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, lengths: Tensor) -> Tensor:
        ctx.lengths = lengths
        return _of_response(values, lengths, "mean")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _of_response(grad, ctx.lengths, "mean"), None


def _of_response(values: Tensor, lengths: Tensor, reduction: str) -> Tensor:
    """[N] sum or mean of values [N] over the tokens of the same response, for each of its tokens.

    A segment's sum runs in the order of its tokens, so it does not depend on other responses.
    """
    if not len(lengths):
        return values.clone()
    # Unsafe and with its size: else a GPU would wait to look at the lengths.
    reduced = torch.segment_reduce(values.contiguous(), reduction, lengths=lengths, unsafe=True)
    return reduced.repeat_interleave(lengths, output_size=len(values))


def metrics_from(sums: Tensor, extrema: Tensor) -> dict[str, float]:
    """Named metrics of SUMS [len(SUMS)] and EXTREMA [len(EXTREMA)]; none that was not measured.

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
    if num := total["corrected_tokens"]:
        metrics["policy/correction_mean"] = total["correction"] / num
        metrics["policy/correction_bounded_frac"] = total["correction_bounded"] / num
    return metrics


class _Meter:
    """Accumulators of [N] values, in float64: float32 counts wrong from 16 million tokens on."""

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
    meter: _Meter, logprobs: Tensor, old: Tensor, ratio: Tensor, flags: ClipFlags | None
) -> None:
    if flags is not None:
        meter.add("clip_low", flags.low)
        meter.add("clip_high", flags.high)
        meter.add("dual_clip", flags.dual)
    meter.add("ratio_tokens", torch.ones_like(ratio))
    meter.add("ratio", ratio)
    meter.largest("ratio", ratio)
    meter.add("kl_old_k1", old - logprobs)
    meter.add("kl_old_k3", k3(logprobs - old))


def _measure_kl(meter: _Meter, logprobs: Tensor, ref: Tensor) -> None:
    meter.add("ref_tokens", torch.ones_like(ref))
    meter.add("kl_ref_k1", logprobs - ref)
    meter.add("kl_ref_k3", k3(ref - logprobs))


def _measure_corrections(meter: _Meter, correction: Corrections) -> None:
    meter.add("corrected_tokens", torch.ones_like(correction.weights))
    meter.add("correction", correction.weights)
    meter.add("correction_bounded", correction.is_bounded)


def _measure_gap(meter: _Meter, gap: Tensor) -> None:
    meter.add("rollout_tokens", torch.ones_like(gap))
    meter.add("gap", gap)
    meter.add("abs_gap", gap.abs())
    meter.largest("abs_gap", gap.abs())
    meter.add("gap_k3", k3(gap))


def _constant(values: Tensor | None, like: Tensor, active: Tensor) -> Tensor | None:
    return None if values is None else values.detach().to(like.dtype).where(active, 0.0)


def _check_inputs(tokens: LossTokens, shared: SharedTerms) -> None:
    if shared.kl_coef != 0 and tokens.ref_logprobs is None:
        raise _missing("ref_logprobs", "kl_coef", shared)
    if shared.correction is not None and tokens.rollout_logprobs is None:
        raise _missing("rollout_logprobs", "correction", shared)


def _missing(name: str, setting: str, shared: SharedTerms) -> ValueError:
    value = getattr(shared, setting)
    return ValueError(f"{setting}={value}: needs {name}, got None; measure {name} first")
