"""The fused losses: against the definitions in float64, in place, chunked, under autograd."""

import pytest
import torch
from megatron_rl.ops.linear_loss import linear_logprobs, linear_policy_loss
from megatron_rl.ops.policy_loss import policy_loss
from megatron_rl.ops.token_loss import LossSpec, metrics_from

from megatron_rl.ops import backend
from megatron_rl.ops.native_loss import LossInputs
from megatron_rl.ops.vocab_parallel import vocab_parallel_logprobs

ops = torch.ops.megatron_rl
CPU = torch.device("cpu")

SPECS = {
    "raft": LossSpec(kind="likelihood"),
    "raft++": LossSpec(kind="clipped_ratio"),
    "grpo": LossSpec(kind="clipped_ratio", eps_high=0.28, kl_coef=0.1, entropy_coef=0.05),
    "dual": LossSpec(kind="clipped_ratio", dual_clip=1.5, kl_coef=0.1, kl_estimator="k2"),
    "tis": LossSpec(kind="clipped_ratio", rollout_is_cap=1.2, kl_coef=0.1, kl_estimator="k1"),
}
HALF = 2.0**-8  # half a step of bfloat16, relative


def problem(rows, vocab, dtype=torch.float64, *, valid=None):
    torch.manual_seed(rows + vocab)
    valid = valid or vocab
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    targets = torch.randint(0, valid, (rows,))
    logprobs = logits[:, :valid].double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    inputs = {
        "old_logprobs": logprobs + 0.4 * torch.randn(rows).double(),
        "ref_logprobs": logprobs + 0.4 * torch.randn(rows).double(),
        "rollout_logprobs": logprobs + 0.4 * torch.randn(rows).double(),
        "advantages": torch.randn(rows).double(),
        "weights": torch.rand(rows).double() / rows,
    }
    return logits, targets, inputs


def run(logits, targets, inputs, spec, *, valid=None, overwrite=False, with_entropy=True):
    leaf = logits.clone().requires_grad_()
    result, logprobs = policy_loss(
        leaf * 1 if overwrite else leaf,  # a leaf must not be overwritten
        targets,
        tp_group=None,
        vocab_start=0,
        valid_vocab=valid or logits.size(1),
        temperature=0.8,
        spec=spec,
        with_entropy=with_entropy,
        overwrite_logits=overwrite,
        **inputs,
    )
    result.loss.backward()
    return result, logprobs, leaf.grad


def as_defined(*args, **settings):
    """The same by the definitions, in float64."""
    before = backend.chosen()
    backend.choose("reference", CPU)
    try:
        return run(*args, **settings)
    finally:
        backend.choose(before, CPU)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_equals_the_definition_in_float64(name, overwrite):
    logits, targets, inputs = problem(11, 57, valid=53)
    inputs["weights"][3] = 0.0
    settings = {"valid": 53}
    expected, logprobs, gradient = as_defined(logits, targets, inputs, SPECS[name], **settings)
    actual = run(logits, targets, inputs, SPECS[name], overwrite=overwrite, **settings)
    torch.testing.assert_close(actual[0].loss, expected.loss)
    torch.testing.assert_close(actual[0].sums, expected.sums)
    torch.testing.assert_close(actual[0].extrema, expected.extrema)
    torch.testing.assert_close(actual[1], logprobs)
    torch.testing.assert_close(actual[2], gradient)
    assert (actual[2][3] == 0).all()
    assert (actual[2][:, 53:] == 0).all()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_large_vocabulary_is_rounded_once(name, overwrite, dtype):
    logits, targets, inputs = problem(3, 151_936, dtype)
    exact = as_defined(logits.double(), targets, inputs, SPECS[name])
    actual = run(logits, targets, inputs, SPECS[name], overwrite=overwrite)
    torch.testing.assert_close(actual[1], exact[1], atol=1e-5, rtol=0, check_dtype=False)
    torch.testing.assert_close(actual[0].sums, exact[0].sums, atol=3e-5, rtol=1e-5)
    best = (exact[2].to(dtype).double() - exact[2]).norm()
    error = (actual[2].double() - exact[2]).norm()
    assert error <= 1.05 * best + 1e-5 * exact[2].norm()


def test_a_factor_on_the_loss_scales_the_gradient():
    logits, targets, inputs = problem(4, 33)
    gradients = []
    for factor in (1.0, -3.0):
        for overwrite in (False, True):
            leaf = logits.clone().requires_grad_()
            result, _ = policy_loss(
                leaf * 1,
                targets,
                tp_group=None,
                vocab_start=0,
                valid_vocab=33,
                temperature=0.8,
                spec=SPECS["grpo"],
                with_entropy=True,
                overwrite_logits=overwrite,
                **inputs,
            )
            (factor * result.loss).backward()
            gradients.append(leaf.grad / factor)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_overwriting_logits_that_something_else_needs_raises(native_only):
    logits, targets, inputs = problem(4, 33)
    settings = {
        "tp_group": None,
        "vocab_start": 0,
        "valid_vocab": 33,
        "temperature": 1.0,
        "with_entropy": False,
        "overwrite_logits": True,
    }
    leaf = logits.clone().requires_grad_()
    shared = leaf * 1
    penalty = shared.square().sum()  # saves the logits for its own backward
    result, _ = policy_loss(shared, targets, spec=SPECS["raft"], **settings, **inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (result.loss + penalty).backward()

    leaf = logits.clone().requires_grad_()
    shared = leaf * 1
    logprobs, _ = vocab_parallel_logprobs(shared, targets, **settings)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk_rows", [2, 7, 100])
def test_chunked_head_equals_the_definition(name, chunk_rows):
    torch.manual_seed(0)
    hidden, weight = torch.randn(17, 6).double(), torch.randn(40, 6).double()
    _, targets, inputs = problem(17, 40, valid=37)
    inputs["weights"][[0, 5]] = 0.0
    settings = {
        "tp_group": None,
        "vocab_start": 0,
        "valid_vocab": 37,
        "temperature": 0.7,
        "spec": SPECS[name],
        "with_entropy": True,
        "chunk_rows": chunk_rows,
        **inputs,
    }

    def once():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result, logprobs = linear_policy_loss(*leaves, targets, **settings)
        (2 * result.loss).backward()
        return result.loss.detach(), result.sums, logprobs, leaves[0].grad, leaves[1].grad

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
    _, targets, inputs = problem(50, 1000)
    shard = {"tp_group": None, "vocab_start": 0, "valid_vocab": 1000, "temperature": 1.0}
    runs = []
    for _ in range(2):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result, logprobs = linear_policy_loss(
            *leaves, targets, spec=SPECS["raft"], with_entropy=False, chunk_rows=16, **shard,
            **inputs,
        )  # fmt: skip
        result.loss.backward()
        runs.append((logprobs, leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    again, _ = linear_logprobs(hidden, weight, targets, chunk_rows=16, **shard)
    assert torch.equal(again, runs[0][0])


def test_a_second_backward_through_the_chunked_head_is_refused(native_only):
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(8, 4, requires_grad=True)
    _, targets, inputs = problem(3, 8)
    result, _ = linear_policy_loss(
        hidden, weight, targets, tp_group=None, vocab_start=0, valid_vocab=8, temperature=1.0,
        spec=SPECS["raft"], with_entropy=False, chunk_rows=2, **inputs,
    )  # fmt: skip
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        result.loss.backward()


def test_no_rows_measure_nothing():
    logits, targets, inputs = problem(0, 8)
    result, logprobs, gradient = run(logits, targets, inputs, SPECS["grpo"])
    assert result.loss.item() == 0.0
    assert metrics_from(result.sums, result.extrema)["policy/trained_tokens"] == 0
    assert logprobs.shape == (0,)
    assert gradient.shape == (0, 8)


def loss_arguments(inputs, spec, dtype=torch.float32, **changes):
    names = ("old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages", "weights")
    values = {name: inputs[name] for name in names} | changes
    return LossInputs(**values, spec=spec, with_entropy=True).to(dtype).arguments()


def test_onepass_has_the_bits_of_two_passes(native_only):
    logits, targets, inputs = problem(5, 3001, torch.bfloat16)
    arguments = loss_arguments(inputs, SPECS["grpo"])
    weights = inputs["weights"].float()
    stats = ops.row_stats(logits, targets, weights, 0, 3000, 1.25, True)
    two = ops.token_loss(stats[None], *arguments, 1.25)
    gradient = ops.dlogits(logits, targets, two[2], None, 0, 3000, 1.25)
    one = ops.policy_loss_onepass_(logits, targets, *arguments, 3000, 1.25, 1.0)
    assert torch.equal(logits, gradient)
    for a, b in zip(one, (two[0], two[1], *two[3:]), strict=True):
        assert torch.equal(a, b)


def test_ratio_is_exactly_one_when_old_logprobs_come_from_the_same_op(native_only):
    logits, targets, inputs = problem(9, 5003, torch.bfloat16)
    stats = ops.row_stats(logits, targets, None, 0, 5003, 1.0, False)
    old, _, _ = ops.merge_stats(stats[None])
    arguments = loss_arguments(inputs, SPECS["raft++"], old_logprobs=old)
    *_, sums, extrema = ops.policy_loss_onepass_(logits, targets, *arguments, 5003, 1.0, 1.0)
    metrics = metrics_from(sums, extrema)
    assert metrics["policy/ratio_max"] == metrics["policy/ratio_mean"] == 1.0


def test_schemas_and_fakes_agree_with_the_ops(native_only):
    logits, targets, inputs = problem(3, 17, torch.float32)
    arguments = loss_arguments(inputs, SPECS["grpo"])
    stats = ops.row_stats(logits, targets, None, 0, 17, 1.0, True)
    torch.library.opcheck(ops.token_loss, (stats[None], *arguments, 1.0))
    torch.library.opcheck(
        ops.policy_loss_onepass_, (logits.clone(), targets, *arguments, 17, 1.0, 1.0)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": torch.zeros(2)}, r"advantages: expected shape \[3\], got shape \[2\]"),
        ({"old_logprobs": torch.zeros(4)}, r"old_logprobs: expected shape \[3\], got shape \[4\]"),
    ],
)
def test_an_error_names_argument_expected_and_actual(native_only, changes, message):
    logits, targets, inputs = problem(3, 17, torch.float32)
    arguments = loss_arguments(inputs, SPECS["grpo"], **changes)
    with pytest.raises(RuntimeError, match="policy_loss_onepass_: " + message):
        ops.policy_loss_onepass_(logits, targets, *arguments, 17, 1.0, 1.0)


def test_a_target_outside_of_the_vocabulary_is_named(native_only):
    logits, targets, inputs = problem(3, 17, torch.float32)
    targets[1] = 17
    arguments = loss_arguments(inputs, SPECS["raft"])
    with pytest.raises(
        RuntimeError, match=r"targets: expected ids in \[0, 17\).*, got 17 in row 1"
    ):
        ops.policy_loss_onepass_(logits, targets, *arguments, 17, 1.0, 1.0)
