import math

import pytest
import torch
from loss_tokens import tokens_of

from megatron_rl.objectives.dpo import PAIR_SUMS, Dpo, pair_metrics

# Two pairs. Tokens: preferred 0, preferred 0, other 0, other 1, preferred 1.
PAIR_OF = torch.tensor([0, 0, 0, 1, 1])
SIGNS = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
LOGPROBS = torch.tensor([-1.0, -0.5, -2.0, -0.25, -3.0], dtype=torch.float64)
REF = torch.tensor([-1.5, -0.75, -1.0, -0.5, -1.0], dtype=torch.float64)
MARGINS = (0.5 + 0.25 - (-1.0), -2.0 - 0.25)  # 1.75 and -2.25


def loss_at(logprobs, ref=REF, pair_of=PAIR_OF, num_pairs=2, **constants):
    tokens = tokens_of(
        torch.full_like(logprobs, 0.5).detach(),
        SIGNS[: len(logprobs)],
        ref_logprobs=ref,
        **constants,
    )
    return Dpo(beta=0.4).pair_loss(logprobs, tokens, pair_of, num_pairs)


def test_loss_and_measurements_match_hand_calculation():
    loss, sums = loss_at(LOGPROBS)
    expected = sum(0.5 * -math.log(1 / (1 + math.exp(-0.4 * margin))) for margin in MARGINS)
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    assert dict(zip(PAIR_SUMS, sums.tolist(), strict=True)) == {
        "pairs": 2.0,
        "preferred": 1.0,
        "margin": pytest.approx(sum(MARGINS)),
    }
    assert pair_metrics(sums) == {
        "policy/pairs": 2.0,
        "policy/pairs_preferred_frac": 0.5,
        "policy/pair_margin_mean": pytest.approx(sum(MARGINS) / 2),
    }
    assert pair_metrics(0 * sums) == {}


def test_the_reference_may_be_the_policy_before_the_iteration():
    as_old, _ = loss_at(LOGPROBS, ref=None, old_logprobs=REF)
    assert torch.equal(as_old, loss_at(LOGPROBS)[0])
    both, _ = loss_at(LOGPROBS, old_logprobs=0 * REF)
    assert torch.equal(both, loss_at(LOGPROBS)[0])


def test_gradient_is_that_of_the_definition():
    """-beta sigmoid(-beta margin) times the sign of the token's response."""
    logprobs = LOGPROBS.clone().requires_grad_()
    loss_at(logprobs)[0].backward()
    pull = [0.5 * 0.4 / (1 + math.exp(0.4 * margin)) for margin in MARGINS]
    expected = [-pull[pair] * sign for pair, sign in zip(PAIR_OF, SIGNS, strict=True)]
    assert logprobs.grad.tolist() == pytest.approx([float(e) for e in expected], rel=1e-14)
    assert torch.autograd.gradcheck(lambda x: loss_at(x)[0], LOGPROBS.clone().requires_grad_())


def test_without_a_reference_every_margin_is_zero():
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, sums = loss_at(logprobs, ref=None)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-14)
    assert logprobs.grad.tolist() == pytest.approx((-0.5 * 0.4 / 2 * SIGNS).tolist())
    assert sums[PAIR_SUMS.index("margin")] == 0


def test_no_pairs_is_a_loss_of_zero_with_a_gradient():
    empty = torch.empty(0, dtype=torch.float64, requires_grad=True)
    loss, _ = loss_at(empty, ref=empty.detach(), pair_of=PAIR_OF[:0], num_pairs=0)
    loss.backward()
    assert loss.item() == 0
    assert empty.grad.shape == (0,)


def test_a_margin_that_overflows_exp_is_no_trouble():
    far = LOGPROBS * 1000
    assert math.isfinite(loss_at(far)[0].item())
