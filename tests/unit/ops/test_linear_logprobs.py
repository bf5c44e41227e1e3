from dataclasses import replace

import pytest
import torch

from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.token_loss import linear_policy_loss, metrics_from
from megatron_rl.ops import head as head_module
from megatron_rl.ops import linear_logprobs as linear_logprobs_module
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.vocab_parallel import Shard, shard_stats
from megatron_rl.types import LossTokens

SHARD = Shard(tp_group=None, vocab_start=0, valid_vocab=10, temperature=0.7)


def problem(num_rows, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(12, 5, dtype=dtype, requires_grad=True)
    tokens = LossTokens(
        at=torch.arange(num_rows),
        targets=torch.randint(0, 10, (num_rows,)),
        old_logprobs=-2 * torch.rand(num_rows),
        ref_logprobs=-2 * torch.rand(num_rows),
        rollout_logprobs=-2 * torch.rand(num_rows),
        advantages=torch.randn(num_rows),
        weights=torch.rand(num_rows),
    )
    return Head(hidden=hidden, head_weight=weight, shard=SHARD), tokens


def loss_and_gradients(num_rows, chunk_rows, dtype=torch.float64):
    head, tokens = problem(num_rows, dtype)
    shared = SharedTerms(kl_coef=0.1, entropy_coef=0.05)
    result = linear_policy_loss(head, tokens, ClippedRatio(), shared, chunk_rows=chunk_rows)
    result.loss.backward()
    return result, result.logprobs, head.hidden.grad, head.head_weight.grad


def test_gradients_equal_finite_differences():
    head, tokens = problem(7)

    def of(hidden, head_weight):
        changed = replace(head, hidden=hidden, head_weight=head_weight)
        return linear_logprobs(changed, tokens.targets, chunk_rows=3)

    assert torch.autograd.gradcheck(of, (head.hidden, head.head_weight))


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
    head, tokens = problem(rows)
    monkeypatch.setattr(head_module, "logits_bytes", lambda device_type: fit * 12 * 8)
    seen = []

    def stats_of(logits, targets, shard):
        seen.append(len(logits))
        return shard_stats(logits, targets, shard)

    monkeypatch.setattr(linear_logprobs_module, "shard_stats", stats_of)
    logprobs, _ = linear_logprobs(head, tokens.targets)
    assert seen == sizes
    whole, _ = linear_logprobs(head, tokens.targets, chunk_rows=100)
    torch.testing.assert_close(logprobs, whole, atol=1e-14, rtol=1e-13)


def test_equals_the_softmax_of_whole_logits():
    head, tokens = problem(9)
    with torch.no_grad():
        actual = linear_logprobs(head, tokens.targets, chunk_rows=4)
    log_p = (head.hidden @ head.head_weight[:10].T / 0.7).log_softmax(-1).detach()
    logprobs = log_p.gather(1, tokens.targets[:, None])[:, 0]
    torch.testing.assert_close(actual, (logprobs, -(log_p.exp() * log_p).sum(-1)))
    assert not actual[0].requires_grad


def test_the_pass_without_gradient_has_the_bits_of_the_pass_with():
    head, tokens = problem(9, torch.float32)
    _, logprobs, _, _ = loss_and_gradients(9, 4, torch.float32)
    with torch.no_grad():
        again, _ = linear_logprobs(head, tokens.targets, chunk_rows=4)
    assert torch.equal(again, logprobs)


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
    head = Head(hidden=hidden, head_weight=weight, shard=Shard(None, 0, 2, 1.0))
    logprobs, _ = linear_logprobs(head, torch.zeros(rows).long(), chunk_rows=1)
    logprobs.sum().backward()
    assert weight.grad.flatten().tolist() == [256.0, -256.0]  # 512 * (1 - 1/2), exact


def test_frozen_inputs_get_no_gradient():
    head, tokens = problem(6)
    frozen = replace(head, head_weight=head.head_weight.detach())
    logprobs, _ = linear_logprobs(frozen, tokens.targets, chunk_rows=4)
    logprobs.sum().backward()
    assert head.hidden.grad.abs().sum() > 0
    assert head.head_weight.grad is None


def test_wrong_shapes_are_named():
    targets = torch.zeros(3).long()
    head = Head(hidden=torch.zeros(3, 5), head_weight=torch.zeros(12, 4), shard=SHARD)
    with pytest.raises(ValueError, match=r"got \[3, 5\], \[12, 4\] and \[3\]"):
        linear_logprobs(head, targets, chunk_rows=2)
    head = replace(head, head_weight=torch.zeros(12, 5))
    with pytest.raises(ValueError, match=r"got \[3, 5\], \[12, 5\] and \[2\]"):
        linear_logprobs(head, targets[:2])
    with pytest.raises(ValueError, match="chunk_rows=0: must be >= 1"):
        linear_logprobs(head, targets, chunk_rows=0)
