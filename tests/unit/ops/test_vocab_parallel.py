import math

import pytest
import torch
from heads import head_of

from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.vocab_parallel import Shard, merge_stats, shard_gradient, shard_stats


def unsharded(logits, targets, *, valid_vocab=None, temperature=1.0):
    head = head_of(logits, valid_vocab=valid_vocab, temperature=temperature)
    return linear_logprobs(head, targets)


def test_probabilities_known_by_hand():
    # at temperature 2: 4, 2, 2 of 8
    logits = 2 * torch.tensor([[4.0, 2.0, 2.0]]).double().log()
    logprobs, entropy = unsharded(logits.repeat(2, 1), torch.tensor([0, 2]), temperature=2.0)
    assert logprobs.tolist() == pytest.approx([math.log(0.5), math.log(0.25)], rel=1e-14)
    assert entropy.tolist() == pytest.approx([1.5 * math.log(2)] * 2, rel=1e-14)


@pytest.mark.parametrize("valid_vocab", [7, 5])
def test_gradients_equal_finite_differences(valid_vocab):
    torch.manual_seed(0)
    logits = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, valid_vocab, (6,))
    assert torch.autograd.gradcheck(
        lambda logits: unsharded(logits, targets, valid_vocab=valid_vocab, temperature=0.6),
        (logits,),
    )


def test_padding_counts_for_nothing():
    logits = torch.tensor([[0.0, 0.0, 1e30]], requires_grad=True)
    logprobs, entropy = unsharded(logits, torch.tensor([1]), valid_vocab=2)
    (logprobs + entropy).sum().backward()
    assert logprobs.item() == entropy.item() * -1 == pytest.approx(-math.log(2))
    assert logits.grad.tolist() == [[-0.5, 0.5, 0.0]]


def test_forbidden_tokens_count_for_nothing():
    """Through the three steps, since a product with a head would make NaN of -inf."""
    logits, targets = torch.tensor([[0.0, -torch.inf, 0.0]]), torch.tensor([2])
    shard = Shard(None, 0, 3, 1.0)
    logprobs, entropy, log_sum_exp = merge_stats(shard_stats(logits, targets, shard)[None])
    one = torch.ones(1)
    gradient = shard_gradient(logits, targets, log_sum_exp, entropy, one, one, shard)
    assert logprobs.item() == pytest.approx(-math.log(2))
    assert entropy.item() == pytest.approx(math.log(2))
    assert gradient.tolist() == [[-0.5, 0.0, 0.5]]


def test_a_target_that_is_no_token_has_no_probability():
    logprobs, _ = unsharded(torch.zeros(3, 4), torch.tensor([-1, 3, 4]), valid_vocab=3)
    assert logprobs.tolist() == [-math.inf] * 3


def test_large_logits_do_not_overflow():
    logprobs, entropy = unsharded(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))
    assert logprobs.item() == -1e4
    assert entropy.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    torch.manual_seed(1)
    logits = (torch.randn(20, 50) * 5).to(dtype)
    targets = torch.randint(0, 50, (20,))
    upstream = torch.randn(20)
    results = []
    for start in (logits, logits.float()):
        leaf = start.clone().requires_grad_()
        logprobs, _ = unsharded(leaf, targets, temperature=0.6)
        logprobs.backward(upstream)
        results.append((logprobs, leaf.grad))
    (logprobs, gradient), (exact_logprobs, exact_gradient) = results
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, exact_logprobs)
    assert torch.equal(gradient, exact_gradient.to(dtype))


@pytest.mark.parametrize("valid_vocab", [12, 9, 5, 1])
def test_merged_shards_equal_the_whole(valid_vocab):
    torch.manual_seed(2)
    logits = torch.randn(10, 12, dtype=torch.float64) * 20
    logits[0, :4] = -torch.inf  # a shard in which every token is forbidden
    targets = torch.randint(0, valid_vocab, (10,))
    targets[0] = valid_vocab - 1
    if valid_vocab <= 4:
        logits[0] = 0.0
    stats = [
        shard_stats(
            logits[:, start : start + 4],
            targets,
            Shard(None, start, valid_vocab, 0.5),
        )
        for start in (0, 4, 8)
    ]
    logprobs, entropy, log_sum_exp = merge_stats(torch.stack(stats))
    log_p = (logits[:, :valid_vocab] / 0.5).log_softmax(-1)
    p = log_p.exp()
    torch.testing.assert_close(logprobs, log_p.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -torch.xlogy(p, p).sum(-1))
    torch.testing.assert_close(log_sum_exp, (logits[:, :valid_vocab] / 0.5).logsumexp(-1))


def test_zero_rows():
    logits = torch.zeros(0, 4, requires_grad=True)
    logprobs, entropy = unsharded(logits, torch.zeros(0).long())
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == entropy.shape == (0,)
    assert logits.grad.shape == (0, 4)
