"""The fused losses: against the definitions in float64, in place, chunked, under autograd."""

from dataclasses import replace

import pytest
import torch
from heads import head_of

from megatron_rl.objectives.cispo import Cispo
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.objective import TokenObjective
from megatron_rl.objectives.sapo import Sapo
from megatron_rl.objectives.token_loss import linear_policy_loss, metrics_from
from megatron_rl.ops import backend
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import Correction, SharedTerms
from megatron_rl.ops.native_loss import loss_arguments
from megatron_rl.ops.vocab_parallel import Shard
from megatron_rl.types import LossTokens

ops = torch.ops.megatron_rl
CPU = torch.device("cpu")

CUT = Correction("token", "truncate", 0.0, 1.2)
MASK = Correction("token", "mask", 0.8, 1.2)
LOSSES = {
    "raft": (Likelihood(), SharedTerms()),
    "raft++": (ClippedRatio(), SharedTerms()),
    "grpo": (ClippedRatio(eps_high=0.28), SharedTerms(kl_coef=0.1, entropy_coef=0.05)),
    "dual": (ClippedRatio(dual_clip=1.5), SharedTerms(kl_coef=0.1, kl_estimator="k2")),
    "cispo": (Cispo(eps_low=0.1, eps_high=0.2), SharedTerms(entropy_coef=0.05)),
    "cispo, no lower bound": (Cispo(eps_high=0.1), SharedTerms(correction=CUT)),
    "sapo": (Sapo(), SharedTerms()),
    "sapo, steep": (Sapo(tau_positive=2.0, tau_negative=5.0), SharedTerms(kl_coef=0.1)),
    "tis": (ClippedRatio(), SharedTerms(correction=CUT, kl_coef=0.1, kl_estimator="k1")),
    "masked": (ClippedRatio(), SharedTerms(correction=MASK, entropy_coef=0.05)),
}


def problem(rows, vocab, dtype=torch.float64, *, valid=None):
    torch.manual_seed(rows + vocab)
    valid = valid or vocab
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    targets = torch.randint(0, valid, (rows,))
    logprobs = logits[:, :valid].double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    tokens = LossTokens(
        at=torch.arange(rows),
        targets=targets,
        old_logprobs=logprobs + 0.4 * torch.randn(rows).double(),
        ref_logprobs=logprobs + 0.4 * torch.randn(rows).double(),
        rollout_logprobs=logprobs + 0.4 * torch.randn(rows).double(),
        advantages=torch.randn(rows).double(),
        weights=torch.rand(rows).double() / rows,
    )
    return logits, tokens


@pytest.fixture(params=["one pass", "two passes"])
def passes(request, monkeypatch):
    """The ways of a vocabulary that is whole, and of one that is split over ranks."""
    if request.param == "two passes":
        monkeypatch.setattr(Shard, "is_whole", False)


def run(logits, tokens, loss, *, valid=None, factor=1.0):
    """(results, gradient of the logits)"""
    head = head_of(logits.clone(), valid_vocab=valid, temperature=0.8)
    leaf = head.head_weight.requires_grad_()
    result = linear_policy_loss(head, tokens, *loss)
    (factor * result.loss).backward()
    return result, leaf.grad.T


def as_defined(*args, **settings):
    """The same by the definitions, in float64."""
    before = backend.chosen()
    backend.choose("reference", CPU)
    try:
        return run(*args, **settings)
    finally:
        backend.choose(before, CPU)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_definition_in_float64(name, passes):
    logits, tokens = problem(11, 57, valid=53)
    tokens.weights[3] = 0.0
    expected, gradient = as_defined(logits, tokens, LOSSES[name], valid=53)
    actual = run(logits, tokens, LOSSES[name], valid=53)
    torch.testing.assert_close(actual[0], expected)
    torch.testing.assert_close(actual[1], gradient)
    assert (actual[1][3] == 0).all()
    assert (actual[1][:, 53:] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_vocabulary_is_rounded_once(name, dtype, passes):
    logits, tokens = problem(3, 151_936, dtype)
    exact, exact_gradient = as_defined(logits.double(), tokens, LOSSES[name])
    actual, gradient = run(logits, tokens, LOSSES[name])
    torch.testing.assert_close(
        actual.logprobs, exact.logprobs, atol=1e-5, rtol=0, check_dtype=False
    )
    torch.testing.assert_close(actual.sums, exact.sums, atol=3e-5, rtol=1e-5)
    best = (exact_gradient.to(dtype).double() - exact_gradient).norm()
    error = (gradient.double() - exact_gradient).norm()
    assert error <= 1.05 * best + 1e-5 * exact_gradient.norm()


def test_a_factor_on_the_loss_scales_the_gradient(passes):
    logits, tokens = problem(4, 33)
    _, gradient = run(logits, tokens, LOSSES["grpo"])
    _, scaled = run(logits, tokens, LOSSES["grpo"], factor=-3.0)
    torch.testing.assert_close(scaled / -3.0, gradient)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_rows", [2, 7, 100])
def test_chunked_head_equals_the_definition(name, chunk_rows):
    torch.manual_seed(0)
    hidden, weight = torch.randn(17, 6).double(), torch.randn(40, 6).double()
    _, tokens = problem(17, 40, valid=37)
    tokens.weights[[0, 5]] = 0.0

    def once():
        head = Head(
            hidden=hidden.clone().requires_grad_(),
            head_weight=weight.clone().requires_grad_(),
            shard=Shard(None, 0, 37, 0.7),
        )
        result = linear_policy_loss(head, tokens, *LOSSES[name], chunk_rows=chunk_rows)
        (2 * result.loss).backward()
        detached = result.loss.detach(), result.sums, result.logprobs
        return *detached, head.hidden.grad, head.head_weight.grad

    actual = once()
    before = backend.chosen()
    backend.choose("reference", CPU)
    expected = once()
    backend.choose(before, CPU)
    torch.testing.assert_close(actual, expected)
    assert (actual[3][[0, 5]] == 0).all()


def test_chunked_head_in_bfloat16_repeats_and_agrees_with_the_pass_without_gradient():
    torch.manual_seed(1)
    hidden = torch.randn(50, 64).to(torch.bfloat16)
    weight = (torch.randn(1000, 64) / 8).to(torch.bfloat16)
    _, tokens = problem(50, 1000)
    runs = []
    for _ in range(2):
        head = Head(
            hidden=hidden.clone().requires_grad_(),
            head_weight=weight.clone().requires_grad_(),
            shard=Shard(None, 0, 1000, 1.0),
        )
        result = linear_policy_loss(head, tokens, *LOSSES["raft"], chunk_rows=16)
        result.loss.backward()
        runs.append((result.logprobs, head.hidden.grad, head.head_weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with torch.no_grad():
        again, _ = linear_logprobs(head, tokens.targets, chunk_rows=16)
    assert torch.equal(again, runs[0][0])


def test_a_second_backward_through_the_chunked_head_is_refused(native_only):
    _, tokens = problem(3, 8)
    head = Head(
        hidden=torch.randn(3, 4, requires_grad=True),
        head_weight=torch.randn(8, 4, requires_grad=True),
        shard=Shard(None, 0, 8, 1.0),
    )
    result = linear_policy_loss(head, tokens, *LOSSES["raft"], chunk_rows=2)
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        result.loss.backward()


def test_an_objective_without_a_kernel_runs_its_definition():
    class Squared(TokenObjective):
        kind: str = "squared"

        def own_terms(self, logprobs, ratio, advantages):
            return advantages * logprobs.square(), None

    logits, tokens = problem(5, 9)
    result, gradient = run(logits, tokens, (Squared(), SharedTerms()))
    leaf = logits.clone().requires_grad_()
    logprobs = (leaf / 0.8).log_softmax(-1).gather(1, tokens.targets[:, None])[:, 0]
    loss = (tokens.weights * tokens.advantages * logprobs.square()).sum()
    loss.backward()
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(gradient, leaf.grad)


def test_no_rows_measure_nothing():
    logits, tokens = problem(0, 8)
    result, gradient = run(logits, tokens, LOSSES["grpo"])
    assert result.loss.item() == 0.0
    assert metrics_from(result.sums, result.extrema)["policy/trained_tokens"] == 0
    assert result.logprobs.shape == (0,)
    assert gradient.shape == (0, 8)


def arguments_of(tokens, loss, dtype=torch.float32, **changes):
    objective, shared = loss
    return loss_arguments(replace(tokens.constants(dtype), **changes), objective.native, shared)


def test_onepass_has_the_bits_of_two_passes(native_only):
    logits, tokens = problem(5, 3001, torch.bfloat16)
    arguments = arguments_of(tokens, LOSSES["grpo"])
    weights = tokens.weights.float()
    stats = ops.row_stats(logits, tokens.targets, weights, 0, 3000, 1.25, True)
    two = ops.token_loss(stats[None], *arguments, 1.25)
    gradient = ops.dlogits(logits, tokens.targets, two[2], None, 0, 3000, 1.25)
    one = ops.policy_loss_onepass_(logits, tokens.targets, *arguments, 3000, 1.25, 1.0)
    assert torch.equal(logits, gradient)
    for a, b in zip(one, (two[0], two[1], *two[3:]), strict=True):
        assert torch.equal(a, b)


def test_ratio_is_exactly_one_when_old_logprobs_come_from_the_same_op(native_only):
    logits, tokens = problem(9, 5003, torch.bfloat16)
    stats = ops.row_stats(logits, tokens.targets, None, 0, 5003, 1.0, False)
    old, _, _ = ops.merge_stats(stats[None])
    arguments = arguments_of(tokens, LOSSES["raft++"], old_logprobs=old)
    *_, sums, extrema = ops.policy_loss_onepass_(logits, tokens.targets, *arguments, 5003, 1.0, 1.0)
    metrics = metrics_from(sums, extrema)
    assert metrics["policy/ratio_max"] == metrics["policy/ratio_mean"] == 1.0


def test_schemas_and_fakes_agree_with_the_ops(native_only):
    logits, tokens = problem(3, 17, torch.float32)
    arguments = arguments_of(tokens, LOSSES["grpo"])
    stats = ops.row_stats(logits, tokens.targets, None, 0, 17, 1.0, True)
    torch.library.opcheck(ops.token_loss, (stats[None], *arguments, 1.0))
    torch.library.opcheck(
        ops.policy_loss_onepass_, (logits.clone(), tokens.targets, *arguments, 17, 1.0, 1.0)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": torch.zeros(2)}, r"advantages: expected shape \[3\], got shape \[2\]"),
        ({"old_logprobs": torch.zeros(4)}, r"old_logprobs: expected shape \[3\], got shape \[4\]"),
    ],
)
def test_an_error_names_argument_expected_and_actual(native_only, changes, message):
    logits, tokens = problem(3, 17, torch.float32)
    arguments = arguments_of(tokens, LOSSES["grpo"], **changes)
    with pytest.raises(RuntimeError, match="policy_loss_onepass_: " + message):
        ops.policy_loss_onepass_(logits, tokens.targets, *arguments, 17, 1.0, 1.0)


def test_a_target_outside_of_the_vocabulary_is_named(native_only):
    logits, tokens = problem(3, 17, torch.float32)
    tokens.targets[1] = 17
    arguments = arguments_of(tokens, LOSSES["raft"])
    with pytest.raises(
        RuntimeError, match=r"targets: expected ids in \[0, 17\).*, got 17 in row 1"
    ):
        ops.policy_loss_onepass_(logits, tokens.targets, *arguments, 17, 1.0, 1.0)
