import pytest
import torch
from megatron_rl.ops.linear_loss import (
    differentiable_linear_logprobs,
    linear_logprobs,
    linear_policy_loss,
)
from megatron_rl.ops.token_loss import LossSpec, metrics_from

from megatron_rl.ops import linear_loss
from megatron_rl.ops.vocab_parallel import shard_stats, vocab_parallel_logprobs

SHARD = {"tp_group": None, "vocab_start": 0, "valid_vocab": 10, "temperature": 0.7}
SPEC = LossSpec(kind="clipped_ratio", kl_coef=0.1, entropy_coef=0.05)


def problem(num_rows, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 5, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 10, (num_rows,))
    inputs = {
        "old_logprobs": -2 * torch.rand(num_rows),
        "ref_logprobs": -2 * torch.rand(num_rows),
        "rollout_logprobs": -2 * torch.rand(num_rows),
        "advantages": torch.randn(num_rows),
        "weights": torch.rand(num_rows),
    }
    return hidden, weight, targets, inputs


def loss_and_gradients(num_rows, chunk_rows, dtype=torch.float64, spec=SPEC):
    hidden, weight, targets, inputs = problem(num_rows, dtype)
    result, logprobs = linear_policy_loss(
        hidden,
        weight,
        targets,
        spec=spec,
        with_entropy=False,
        chunk_rows=chunk_rows,
        **inputs,
        **SHARD,
    )
    result.loss.backward()
    return result, logprobs, hidden.grad, weight.grad


def test_gradients_equal_finite_differences():
    hidden, weight, targets, _ = problem(7)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: differentiable_linear_logprobs(
            hidden, weight, targets, chunk_rows=3, **SHARD
        ),
        (hidden, weight),
    )


@pytest.mark.parametrize("chunk_rows", [1, 4, 9, 1000])
def test_chunks_change_nothing_but_rounding(chunk_rows):
    whole = loss_and_gradients(9, 9)
    chunked = loss_and_gradients(9, chunk_rows)
    close = {"atol": 1e-14, "rtol": 1e-13}
    torch.testing.assert_close(chunked[0].loss, whole[0].loss, **close)
    torch.testing.assert_close(chunked[0].sums, whole[0].sums, **close)
    torch.testing.assert_close(chunked[1:], whole[1:], **close)


@pytest.mark.parametrize(
    ("rows", "fit", "sizes"),
    [
        (0, 4, []),
        (4, 4, [4]),
        (5, 4, [3, 2]),  # not 4 and 1: a chunk costs the same whatever its size
        (9, 4, [3, 3, 3]),
        (3, 0, [1, 1, 1]),  # one row is always possible
    ],
)
def test_there_are_as_few_chunks_as_fit(monkeypatch, rows, fit, sizes):
    hidden, weight, targets, _ = problem(rows)
    monkeypatch.setattr(linear_loss, "LOGITS_BYTES", fit * 12 * 8)
    seen = []

    def stats_of(logits, targets, **shard):
        seen.append(len(logits))
        return shard_stats(logits, targets, **shard)

    monkeypatch.setattr(linear_loss, "shard_stats", stats_of)
    logprobs, _ = linear_logprobs(hidden, weight, targets, **SHARD)
    assert seen == sizes
    whole, _ = linear_logprobs(hidden, weight, targets, chunk_rows=100, **SHARD)
    torch.testing.assert_close(logprobs, whole, atol=1e-14, rtol=1e-13)


def test_equals_the_loss_of_whole_logits():
    hidden, weight, targets, _ = problem(9)
    logprobs, entropy = vocab_parallel_logprobs(
        hidden @ weight.T, targets, with_entropy=True, **SHARD
    )
    actual = linear_logprobs(hidden, weight, targets, chunk_rows=4, with_entropy=True, **SHARD)
    torch.testing.assert_close(actual, (logprobs.detach(), entropy.detach()))
    assert not actual[0].requires_grad


def test_the_pass_without_gradient_has_the_bits_of_the_pass_with():
    hidden, weight, targets, _ = problem(9, torch.float32)
    _, logprobs, _, _ = loss_and_gradients(9, 4, torch.float32)
    again, entropy = linear_logprobs(hidden, weight, targets, chunk_rows=4, **SHARD)
    assert torch.equal(again, logprobs)
    assert entropy is None


def test_zero_rows_are_a_connected_loss_of_zero():
    result, logprobs, hidden_grad, weight_grad = loss_and_gradients(0, 4)
    assert result.loss.item() == 0.0
    assert metrics_from(result.sums, result.extrema)["policy/trained_tokens"] == 0
    assert logprobs.shape == (0,)
    assert hidden_grad.shape == (0, 5)
    assert torch.equal(weight_grad, torch.zeros(12, 5, dtype=torch.float64))


def test_half_precision_weight_gradient_is_summed_before_it_is_rounded():
    # each row adds 1/2: a sum kept in bfloat16 would stop growing at 128
    rows = 512
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    shard = SHARD | {"valid_vocab": 2, "temperature": 1.0}
    logprobs, _ = differentiable_linear_logprobs(
        hidden, weight, torch.zeros(rows).long(), chunk_rows=1, **shard
    )
    logprobs.sum().backward()
    assert weight.grad.flatten().tolist() == [256.0, -256.0]  # 512 * (1 - 1/2), exact


def test_frozen_inputs_get_no_gradient():
    hidden, weight, targets, _ = problem(6)
    logprobs, _ = differentiable_linear_logprobs(
        hidden, weight.detach(), targets, chunk_rows=4, **SHARD
    )
    logprobs.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"got \[3, 5\], \[12, 4\] and \[3\]"):
        linear_logprobs(
            torch.zeros(3, 5), torch.zeros(12, 4), torch.zeros(3).long(), chunk_rows=2, **SHARD
        )
    with pytest.raises(ValueError, match="chunk_rows=0: must be >= 1"):
        linear_logprobs(
            torch.zeros(3, 5), torch.zeros(12, 5), torch.zeros(3).long(), chunk_rows=0, **SHARD
        )
