import math

import pytest
import torch
from loss_tokens import tokens_of

from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.token_loss import metrics_from
from megatron_rl.ops.loss_spec import EXTREMA, SUMS, SharedTerms


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def measure(token_loss, rows=slice(None), *, objective=None, **changes):
    """Four tokens with ratios 2, 0.5, 3, 1, of which the last has no weight."""
    inputs = {
        "entropy": f64(1.0, 2.0, 3.0, 100.0),
        "old_logprobs": f64(-2.0, -2.0, -2.0, -2.0),
        "ref_logprobs": f64(-2.0, -2.0, -2.0, -9.0),
        "rollout_logprobs": f64(-2.5, -1.75, -2.0, -9.0),
        "advantages": f64(1.0, -1.0, -2.0, 1.0),
        "weights": f64(0.5, 0.25, 0.25, 0.0),
    } | changes
    entropy = inputs.pop("entropy")
    logprobs = -2.0 + f64(2.0, 0.5, 3.0, 1.0).log()
    return token_loss(
        logprobs[rows],
        None if entropy is None else entropy[rows],
        tokens_of(**inputs)[rows],
        objective or ClippedRatio(dual_clip=2.5),
        SharedTerms(),
    )


def test_metrics_match_hand_calculation(token_loss):
    result = measure(token_loss)
    log2, log3 = math.log(2.0), math.log(3.0)
    k3_of_ref = [0.5 - 1 + log2, 2.0 - 1 - log2, 1 / 3 - 1 + log3]  # 1/s - 1 + log s
    k3_of_old = [2.0 - 1 - log2, 0.5 - 1 + log2, 3.0 - 1 - log3]  # s - 1 - log s
    expected = {
        "policy/trained_tokens": 3.0,
        "policy/loss": 0.5 * -1.2 + 0.25 * 0.8 + 0.25 * 5.0,
        "policy/clip_high_frac": 1 / 3,
        "policy/clip_low_frac": 1 / 3,
        "policy/dual_clip_frac": 1 / 3,
        "policy/ratio_mean": 5.5 / 3,
        "policy/ratio_max": 3.0,
        "policy/entropy_mean": 2.0,
        "policy/kl_ref_k1": (log2 - log2 + log3) / 3,
        "policy/kl_ref_k3": sum(k3_of_ref) / 3,
        "policy/kl_old_k1": -log3 / 3,
        "policy/kl_old_k3": sum(k3_of_old) / 3,
        "rollout/logprob_gap_mean": (0.5 + 0.25 + 0.0) / 3,
        "rollout/logprob_gap_max": 0.5,
        "rollout/logprob_gap_k3": (math.exp(0.5) - 1.5 + math.exp(-0.25) - 0.75) / 3,
    }
    assert metrics_from(result.sums, result.extrema) == pytest.approx(expected, rel=1e-12)
    assert result.loss.item() == pytest.approx(expected["policy/loss"])
    assert result.sums[SUMS.index("gap")].item() == pytest.approx(0.25)


def test_accumulated_micro_batches_give_the_metrics_of_the_whole(token_loss):
    whole = measure(token_loss)
    parts = [measure(token_loss, rows) for rows in (slice(0, 1), slice(1, 1), slice(1, 4))]
    sums = sum(part.sums for part in parts)
    extrema = torch.stack([part.extrema for part in parts]).amax(0)
    expected = metrics_from(whole.sums, whole.extrema)
    assert metrics_from(sums, extrema) == pytest.approx(expected, rel=1e-12)


def test_what_was_not_measured_is_absent(token_loss):
    nothing = dict.fromkeys(("entropy", "old_logprobs", "ref_logprobs", "rollout_logprobs"))
    result = measure(token_loss, objective=Likelihood(), **nothing)
    assert set(metrics_from(result.sums, result.extrema)) == {
        "policy/loss",
        "policy/trained_tokens",
    }


def test_a_likelihood_with_old_logprobs_measures_the_drift_but_clips_nothing(token_loss):
    result = measure(token_loss, objective=Likelihood())
    metrics = metrics_from(result.sums, result.extrema)
    assert metrics["policy/ratio_max"] == pytest.approx(3.0)
    assert metrics["policy/clip_high_frac"] == 0.0


def test_nothing_accumulated_is_no_metrics_but_a_loss_of_zero():
    metrics = metrics_from(torch.zeros(len(SUMS)), torch.zeros(len(EXTREMA)))
    assert metrics == {"policy/loss": 0.0, "policy/trained_tokens": 0.0}
