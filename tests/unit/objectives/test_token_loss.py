import math

import pytest
import torch
from loss_tokens import tokens_of

from megatron_rl.objectives.cispo import Cispo
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.gspo import Gspo
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.sapo import Sapo
from megatron_rl.objectives.token_loss import k3, kl_estimate, linear_policy_loss, metrics_from
from megatron_rl.objectives.token_loss import token_loss as token_loss_definition
from megatron_rl.ops.head import Head
from megatron_rl.ops.loss_spec import Correction, SharedTerms
from megatron_rl.ops.vocab_parallel import Shard

NOTHING_SHARED = SharedTerms()
CAP = Correction("token", "truncate", 0.0, 1.5)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def loss_and_gradient(token_loss, ratio, advantage, **settings):
    """Of one token of weight 1 with this ratio."""
    logprobs = f64(math.log(ratio)).requires_grad_()
    tokens = tokens_of(f64(1.0), f64(advantage), old_logprobs=f64(0.0))
    result = token_loss(logprobs, None, tokens, ClippedRatio(**settings), NOTHING_SHARED)
    result.loss.backward()
    return result.loss.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.3, 0.0),  # credit for moving towards stops at 1 + eps_high
        (1.25, 1.0, -1.25, -1.25),
        (0.5, 1.0, -0.5, -0.5),  # and never for catching up
        (0.5, -1.0, 0.8, 0.0),  # credit for moving away stops at 1 - eps_low
        (0.9, -1.0, 0.9, 0.9),
        (1.5, -1.0, 1.5, 1.5),  # blame never stops
        (4.0, -2.0, 8.0, 8.0),
        (1.0, 0.0, 0.0, 0.0),
        (4.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip_stops_credit_but_not_blame(token_loss, ratio, advantage, loss, gradient):
    actual = loss_and_gradient(token_loss, ratio, advantage, eps_low=0.2, eps_high=0.3)
    assert actual == pytest.approx((loss, gradient), abs=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (4.0, -2.0, 6.0, 0.0),  # -3 * A instead of -4 * A
        (2.9, -2.0, 5.8, 5.8),
        (0.5, -2.0, 1.6, 0.0),  # the lower clip is as it was
        (4.0, 2.0, -2.4, 0.0),  # and positive advantages too
    ],
)
def test_dual_clip_bounds_the_blame(token_loss, ratio, advantage, loss, gradient):
    actual = loss_and_gradient(token_loss, ratio, advantage, dual_clip=3.0)
    assert actual == pytest.approx((loss, gradient), abs=1e-14)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.3 * math.log(1.5), -1.3),  # the weight is cut, the gradient stays
        (1.5, -2.0, 2.6 * math.log(1.5), 2.6),  # whatever the advantage
        (1.1, 1.0, -1.1 * math.log(1.1), -1.1),
        (0.5, 1.0, -0.8 * math.log(0.5), -0.8),
        (0.5, -1.0, 0.8 * math.log(0.5), 0.8),
    ],
)
def test_cispo_cuts_the_weight_and_keeps_the_gradient(token_loss, ratio, advantage, loss, gradient):
    objective = Cispo(eps_low=0.2, eps_high=0.3)
    actual = of_one_token(token_loss, objective, ratio, advantage)
    assert actual == pytest.approx((loss, gradient), abs=1e-14)


def test_cispo_has_no_lower_bound_by_default(token_loss):
    assert of_one_token(token_loss, Cispo(), 0.01, 1.0)[1] == pytest.approx(-0.01)
    assert of_one_token(token_loss, Cispo(), 9.0, 1.0)[1] == pytest.approx(-5.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # 4 * sigmoid(0) = 2, and 4 * 1/2 * 1/2 = 1: the slope of the ratio itself
        (1.0, 1.0, -2.0, -1.0),
        (1.0, -1.0, 2 / 1.05, 1.0),
        # sigmoid(1) = 0.7310585786300049, sigmoid(1.05) = 0.7407748991821539
        (2.0, 1.0, -2.9242343145200196, -1.5728954659318548),
        (2.0, -1.0, 2.821999615932015, 1.5362195833905885),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_sapo_has_a_soft_gate(token_loss, ratio, advantage, loss, gradient):
    actual = of_one_token(token_loss, Sapo(), ratio, advantage)
    assert actual == pytest.approx((loss, gradient), abs=1e-12)


def test_gspo_has_one_ratio_of_a_response():
    """Two responses of 2 and 1 tokens, weights 1 / (2 len); by hand."""
    logprobs = f64(math.log(1.2), math.log(1.1), math.log(0.9)).requires_grad_()
    tokens = tokens_of(f64(0.25, 0.25, 0.5), f64(1.0, 1.0, -2.0), old_logprobs=f64(0.0, 0.0, 0.0))
    lengths = torch.tensor([2, 1])
    first = math.sqrt(1.2 * 1.1)  # 1.1489
    wide = token_loss_definition(
        logprobs, None, tokens, Gspo(eps_low=0.2, eps_high=0.2), NOTHING_SHARED, lengths
    )
    wide.loss.backward()
    assert wide.loss.item() == pytest.approx((-first + 2 * 0.9) / 2)
    # d s / d log pi_t = s / len, so each token of the first has -s / 2 / 2.
    assert logprobs.grad.tolist() == pytest.approx([-first / 4, -first / 4, 0.9])
    logprobs.grad = None
    tight = token_loss_definition(
        logprobs, None, tokens, Gspo(eps_low=0.05, eps_high=0.1), NOTHING_SHARED, lengths
    )
    tight.loss.backward()
    assert tight.loss.item() == pytest.approx((-1.1 + 2 * 0.95) / 2)
    assert logprobs.grad.tolist() == [0.0, 0.0, 0.0]
    found = metrics_from(tight.sums, tight.extrema)
    assert (found["policy/clip_high_frac"], found["policy/clip_low_frac"]) == (2 / 3, 1 / 3)
    assert found["policy/ratio_max"] == pytest.approx(first)


def of_one_token(token_loss, objective, ratio, advantage):
    """Loss and gradient of one token of weight 1."""
    logprobs = f64(math.log(ratio)).requires_grad_()
    tokens = tokens_of(f64(1.0), f64(advantage), old_logprobs=f64(0.0))
    result = token_loss(logprobs, None, tokens, objective, NOTHING_SHARED)
    result.loss.backward()
    return result.loss.item(), logprobs.grad.item()


def test_likelihood_is_minus_advantage_times_logprob(token_loss):
    logprobs = f64(-0.5, -2.0, -3.0).requires_grad_()
    tokens = tokens_of(f64(0.5, 0.25, 1.0), f64(1.0, -1.0, 0.5))
    result = token_loss(logprobs, None, tokens, Likelihood(), NOTHING_SHARED)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.5 * 0.5 - 0.25 * 2.0 + 0.5 * 3.0)
    assert logprobs.grad.tolist() == [-0.5, 0.25, -0.5]


def test_without_old_logprobs_the_ratio_is_exactly_one(token_loss):
    logprobs = torch.randn(50).mul(10).requires_grad_()
    advantages, weights = torch.randn(50), torch.rand(50)
    tokens = tokens_of(weights, advantages)
    result = token_loss(logprobs, None, tokens, ClippedRatio(), NOTHING_SHARED)
    result.loss.backward()
    torch.testing.assert_close(result.loss, (weights * -advantages).sum())
    assert torch.equal(logprobs.grad, weights * -advantages)


@pytest.mark.parametrize("log_ratio", [30.0, 1000.0, -30.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_outlier_ratio_is_finite_and_without_gradient(token_loss, log_ratio, advantage):
    logprobs = torch.tensor([log_ratio], requires_grad=True)
    tokens = tokens_of(torch.ones(1), torch.tensor([advantage]), old_logprobs=torch.zeros(1))
    result = token_loss(logprobs, None, tokens, ClippedRatio(), NOTHING_SHARED)
    result.loss.backward()
    assert result.loss.isfinite()
    assert logprobs.grad.item() == 0.0


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", -0.5, 1.0),
        ("k2", 0.125, -0.5),
        ("k3", 0.1487212707001282, 1 - 1.6487212707001282),  # exp(0.5) - 1 - 0.5
    ],
)
def test_kl_estimators(estimator, value, gradient):
    logprobs = f64(-1.5).requires_grad_()
    kl = kl_estimate(logprobs, f64(-1.0), estimator)
    kl.sum().backward()
    assert kl.item() == pytest.approx(value, rel=1e-14)
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-14)


@pytest.mark.parametrize(
    ("d", "value"),
    [
        (0.0, 0.0),
        (1e-5, 5.000016666708333e-11),  # d^2/2 + d^3/6 + d^4/24
        (-1e-5, 4.999983333375e-11),
        (1e-3, 5.001667083416681e-07),
        (0.02, 2.0134002675581e-04),  # exp(0.02) = 1.02020134002675581
        (0.03, 4.5453395351686e-04),  # exp(0.03) = 1.03045453395351686
        (0.1, 5.17091807564762e-03),
        (-0.5, 0.10653065971263342),
        (100.0, math.exp(20.0) - 21.0),
        (-100.0, math.exp(-20.0) + 19.0),
    ],
)
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-11), (torch.float32, 5e-6)])
def test_k3_keeps_its_digits_near_zero_and_its_bound_far_away(d, value, dtype, rel):
    assert k3(torch.tensor(d, dtype=dtype)).item() == pytest.approx(value, rel=rel, abs=0)


def test_k3_is_zero_gradient_outside_its_bound():
    d = f64(25.0, -25.0, 1.0).requires_grad_()
    k3(d).sum().backward()
    assert d.grad.tolist() == pytest.approx([0.0, 0.0, math.e - 1], abs=1e-14)


def test_importance_weights_are_capped_and_have_no_gradient(token_loss):
    logprobs = f64(-1.0, -1.0).requires_grad_()
    old = f64(-1.0, -1.0)
    rollout = f64(-1.0 - math.log(2.0), -1.0 - math.log(0.5))  # weights 2 and 0.5
    tokens = tokens_of(f64(1.0, 1.0), f64(1.0, 1.0), old_logprobs=old, rollout_logprobs=rollout)
    result = token_loss(logprobs, None, tokens, ClippedRatio(), SharedTerms(correction=CAP))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-1.5 - 0.5)
    assert logprobs.grad.tolist() == pytest.approx([-1.5, -0.5])
    metrics = metrics_from(result.sums, result.extrema)
    assert metrics["policy/correction_mean"] == pytest.approx((1.5 + 0.5) / 2)
    assert metrics["policy/correction_bounded_frac"] == 0.5


# Two responses of two tokens: ratios 2 and 0.5, whose product is 1, and twice 2, whose is 4.
@pytest.mark.parametrize(
    ("correction", "weights", "bounded"),
    [
        (("token", "truncate", 0.0, 1.5), [1.5, 0.5, 1.5, 1.5], 0.75),
        (("token", "truncate", 0.6, 9.0), [2.0, 0.6, 2.0, 2.0], 0.25),
        (("token", "mask", 0.0, 1.5), [0.0, 0.5, 0.0, 0.0], 0.75),
        (("token", "mask", 0.6, 9.0), [2.0, 0.0, 2.0, 2.0], 0.25),
        (("sequence", "truncate", 0.0, 3.0), [1.0, 1.0, 3.0, 3.0], 0.5),
        (("sequence", "mask", 0.0, 3.0), [1.0, 1.0, 0.0, 0.0], 0.5),
        (("sequence", "mask", 2.0, 9.0), [0.0, 0.0, 4.0, 4.0], 0.5),
        (("geometric", "truncate", 0.0, 1.5), [1.0, 1.0, 1.5, 1.5], 0.5),
        (("geometric", "mask", 0.0, 1.5), [1.0, 1.0, 0.0, 0.0], 0.5),
        (("geometric", "mask", 0.5, 9.0), [1.0, 1.0, 2.0, 2.0], 0.0),
    ],
)
@pytest.mark.parametrize("has_old", [True, False])
def test_corrections_by_level_and_mode(correction, weights, bounded, has_old):
    """The policy term alone is weighed: the KL of 0.5 nats by k1 stays as it is."""
    logprobs = f64(-1.0, -1.0, -1.0, -1.0).requires_grad_()
    half, twice = -1.0 - math.log(0.5), -1.0 - math.log(2.0)
    tokens = tokens_of(
        f64(1.0, 1.0, 1.0, 1.0),
        f64(1.0, -1.0, 1.0, 1.0),
        old_logprobs=f64(-1.0, -1.0, -1.0, -1.0) if has_old else None,
        ref_logprobs=f64(-1.5, -1.5, -1.5, -1.5),
        rollout_logprobs=f64(twice, half, twice, twice),
    )
    shared = SharedTerms(correction=Correction(*correction), kl_coef=0.1, kl_estimator="k1")
    responses = torch.tensor([2, 2])
    result = token_loss_definition(logprobs, None, tokens, ClippedRatio(), shared, responses)
    result.loss.backward()
    own = [-weights[0], weights[1], -weights[2], -weights[3]]
    assert result.loss.item() == pytest.approx(sum(own) + 4 * 0.1 * 0.5)
    assert logprobs.grad.tolist() == pytest.approx([term + 0.1 for term in own])
    metrics = metrics_from(result.sums, result.extrema)
    assert metrics["policy/correction_mean"] == pytest.approx(sum(weights) / 4)
    assert metrics["policy/correction_bounded_frac"] == bounded


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("objective", [Likelihood(), ClippedRatio(dual_clip=1.5)])
def test_gradient_equals_finite_differences(token_loss, objective, estimator):
    torch.manual_seed(3)
    tokens = random_tokens(40)
    shared = SharedTerms(
        kl_coef=0.3,
        kl_estimator=estimator,
        entropy_coef=0.2,
        correction=Correction("token", "truncate", 0.9, 1.1),
    )

    def loss(logprobs, entropy):
        return token_loss(logprobs, entropy, tokens, objective, shared).loss

    logprobs = (-torch.rand(40).double() * 3).requires_grad_()
    entropy = torch.rand(40).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (logprobs, entropy), eps=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_formulas_of_the_paper(token_loss, seed):
    torch.manual_seed(seed)
    tokens = random_tokens(60)
    logprobs, entropy = -torch.rand(60).double() * 3, torch.rand(60).double()
    eps_low, eps_high, dual, kl_coef, entropy_coef = 0.1, 0.3, 1.4, 0.05, 0.01

    total = 0.0
    for t in range(60):
        current, old, ref, rollout, advantage, weight = (
            series[t].item()
            for series in (
                logprobs,
                tokens.old_logprobs,
                tokens.ref_logprobs,
                tokens.rollout_logprobs,
                tokens.advantages,
                tokens.weights,
            )
        )
        s = math.exp(current - old)
        clipped = min(max(s, 1 - eps_low), 1 + eps_high)
        policy = -min(s * advantage, clipped * advantage)
        if advantage < 0:
            policy = min(policy, -dual * advantage)
        policy *= min(math.exp(old - rollout), 1.5)
        kl = math.exp(ref - current) - 1 - (ref - current)
        total += weight * (policy + kl_coef * kl - entropy_coef * entropy[t].item())

    objective = ClippedRatio(eps_low=eps_low, eps_high=eps_high, dual_clip=dual)
    shared = SharedTerms(kl_coef=kl_coef, entropy_coef=entropy_coef, correction=CAP)
    loss = token_loss(logprobs, entropy, tokens, objective, shared).loss
    assert loss.item() == pytest.approx(total, rel=1e-12)


def test_weightless_tokens_have_no_gradient_whatever_else_they_say(token_loss):
    logprobs = torch.tensor([-1.0, -torch.inf, -2.0, -3.0], requires_grad=True)
    entropy = torch.tensor([1.0, torch.nan, 1.0, 1.0], requires_grad=True)
    poison = torch.tensor([-1.0, torch.nan, -torch.inf, -2.0])
    tokens = tokens_of(
        torch.tensor([1.0, 0.0, 0.0, 0.0]),
        torch.tensor([1.0, torch.nan, 1.0, 1.0]),
        old_logprobs=poison,
        ref_logprobs=poison,
        rollout_logprobs=poison,
    )
    shared = SharedTerms(kl_coef=1.0, entropy_coef=1.0, correction=CAP)
    result = token_loss(logprobs, entropy, tokens, ClippedRatio(), shared)
    result.loss.backward()
    assert result.loss.item() == -2.0  # ratio 1, no KL, entropy 1
    assert logprobs.grad.tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert entropy.grad.tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert result.sums.isfinite().all()


def test_metric_only_entropy_gets_no_gradient(token_loss):
    logprobs = f64(-1.0).requires_grad_()
    entropy = f64(0.5).requires_grad_()
    tokens = tokens_of(f64(1.0), f64(1.0))
    result = token_loss(logprobs, entropy, tokens, Likelihood(), NOTHING_SHARED)
    result.loss.backward()
    assert entropy.grad is None


@pytest.mark.parametrize(
    ("setting", "name"),
    [({"kl_coef": 0.1}, "ref_logprobs"), ({"correction": CAP}, "rollout_logprobs")],
)
def test_a_missing_constant_is_named(setting, name):
    shared, tokens = SharedTerms(**setting), tokens_of(f64(1.0), f64(1.0))
    with pytest.raises(ValueError, match=f"needs {name}, got None"):
        token_loss_definition(f64(-1.0), f64(0.5), tokens, ClippedRatio(), shared)
    head = Head(
        hidden=torch.zeros(1, 2), head_weight=torch.zeros(3, 2), shard=Shard(None, 0, 3, 1.0)
    )
    with pytest.raises(ValueError, match=f"needs {name}, got None"):
        linear_policy_loss(head, tokens, ClippedRatio(), shared)


def test_a_missing_entropy_is_named():
    tokens, shared = tokens_of(f64(1.0), f64(1.0)), SharedTerms(entropy_coef=0.1)
    with pytest.raises(ValueError, match="needs entropy, got None"):
        token_loss_definition(f64(-1.0), None, tokens, ClippedRatio(), shared)


def random_tokens(num_tokens):
    def logprobs():
        return -torch.rand(num_tokens, dtype=torch.float64) * 3

    old, ref, rollout = logprobs(), logprobs(), logprobs()
    advantages = torch.randn(num_tokens, dtype=torch.float64)
    weights = torch.rand(num_tokens, dtype=torch.float64)
    return tokens_of(
        weights, advantages, old_logprobs=old, ref_logprobs=ref, rollout_logprobs=rollout
    )
