import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks

from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.token_loss import linear_policy_loss
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.vocab_parallel import Shard
from megatron_rl.types import LossTokens

ROWS, HIDDEN, TEMPERATURE = 33, 16, 0.7

# 52 of 64: with four ranks of 16 columns, the last one has 4 of its own.
# 20 of 64: with four ranks, one is cut and two are nothing but padding.
VALID_VOCABS = [64, 52, 20]
PADDED_VOCAB = 64

# Of what is compared with float64: sums of up to 64 numbers near 1, gradients of up to 30 in size.
TOLERANCES = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: {"atol": 3e-5, "rtol": 1e-4},
}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_values_and_gradients_equal_the_unsharded_ones(tp):
    run_on_ranks(tp, check_logprobs, tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_linear_loss_and_its_gradients_equal_the_unsharded_ones(tp):
    run_on_ranks(tp, check_linear_loss, tp)


def test_every_rank_has_the_same_bits():
    run_on_ranks(4, check_bits, 4)


def test_the_backward_joins_no_collective():
    run_on_ranks(2, check_backward_of_one_rank, 2)


def check_logprobs(tp: int) -> None:
    for valid_vocab in VALID_VOCABS:
        for dtype, tolerance in TOLERANCES.items():
            logits, targets, logprobs_grad, entropy_grad = logits_problem(valid_vocab)
            exact = logits.clone().requires_grad_()
            log_p = (exact[:, :valid_vocab] / TEMPERATURE).log_softmax(-1)
            logprobs = log_p.gather(-1, targets[:, None])[:, 0]
            entropy = -(log_p.exp() * log_p).sum(-1)
            (logprobs @ logprobs_grad + entropy @ entropy_grad).backward()

            head = head_of(my_part(logits, tp, dim=1).to(dtype), tp, valid_vocab)
            shard = head.head_weight.requires_grad_()
            actual_logprobs, actual_entropy = linear_logprobs(head, targets)
            (
                actual_logprobs @ logprobs_grad.to(dtype) + actual_entropy @ entropy_grad.to(dtype)
            ).backward()

            close = {"check_dtype": False, **tolerance}
            torch.testing.assert_close(actual_logprobs, logprobs, **close)
            torch.testing.assert_close(actual_entropy, entropy, **close)
            torch.testing.assert_close(shard.grad.T, my_part(exact.grad, tp, dim=1), **close)
            start = head.shard.vocab_start
            assert (shard.grad[max(valid_vocab - start, 0) :] == 0).all()


def check_linear_loss(tp: int) -> None:
    for valid_vocab in VALID_VOCABS:
        for dtype, tolerance in TOLERANCES.items():
            hidden, weight, tokens = linear_problem(valid_vocab)
            exact_hidden, exact_weight = (
                hidden.clone().requires_grad_(),
                weight.clone().requires_grad_(),
            )
            log_p = (exact_hidden @ exact_weight[:valid_vocab].T / TEMPERATURE).log_softmax(-1)
            loss = reference_loss(log_p, tokens)
            loss.backward()

            my_hidden = hidden.to(dtype).requires_grad_()
            my_weight = my_part(weight, tp, dim=0).to(dtype).requires_grad_()
            for chunk_rows in (8, 100):
                my_hidden.grad = my_weight.grad = None
                head = Head(
                    hidden=my_hidden, head_weight=my_weight, shard=my_shard(tp, valid_vocab)
                )
                result = linear_policy_loss(head, tokens, *LOSS, chunk_rows=chunk_rows)
                result.loss.backward()
                dist.all_reduce(my_hidden.grad)  # as the mapping behind the LM head does

                close = {"check_dtype": False, **tolerance}
                torch.testing.assert_close(result.loss, loss, **close)
                exact_logprobs = log_p.detach().gather(-1, tokens.targets[:, None])[:, 0]
                torch.testing.assert_close(result.logprobs, exact_logprobs, **close)
                torch.testing.assert_close(my_hidden.grad, exact_hidden.grad, **close)
                torch.testing.assert_close(
                    my_weight.grad, my_part(exact_weight.grad, tp, dim=0), **close
                )
                with torch.no_grad():
                    again, _ = linear_logprobs(head, tokens.targets, chunk_rows=chunk_rows)
                assert torch.equal(again, result.logprobs)


def check_bits(tp: int) -> None:
    logits, targets, _, _ = logits_problem(52)
    results = linear_logprobs(head_of(my_part(logits, tp, dim=1).float(), tp, 52), targets)
    for result in results:
        everyones = [torch.empty_like(result) for _ in range(tp)]
        dist.all_gather(everyones, result)
        assert all(torch.equal(other, result) for other in everyones)


def check_backward_of_one_rank(tp: int) -> None:
    hidden, weight, tokens = linear_problem(52)
    hidden.requires_grad_()
    head = Head(hidden=hidden, head_weight=my_part(weight, tp, dim=0), shard=my_shard(tp, 52))
    result = linear_policy_loss(head, tokens, *LOSS, chunk_rows=8)
    if dist.get_rank() == 0:
        result.loss.backward()  # would wait for rank 1 until the test times out
        assert hidden.grad.abs().sum() > 0


LOSS = (ClippedRatio(), SharedTerms(kl_coef=0.1, kl_estimator="k3", entropy_coef=0.05))


def reference_loss(log_p, tokens):
    """The same loss as LOSS, from the definitions."""
    logprobs = log_p.gather(-1, tokens.targets[:, None])[:, 0]
    ratio = (logprobs - tokens.old_logprobs).exp()
    advantages = tokens.advantages
    policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    to_ref = tokens.ref_logprobs - logprobs
    kl = to_ref.exp() - 1 - to_ref
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (tokens.weights * (policy + 0.1 * kl - 0.05 * entropy)).sum()


def logits_problem(valid_vocab):
    torch.manual_seed(valid_vocab)  # every rank builds the whole problem, then takes its part
    logits = torch.randn(ROWS, PADDED_VOCAB, dtype=torch.float64) * 10
    logits[:, valid_vocab:] = 1e3  # padding that counted would swamp everything
    targets = torch.randint(0, valid_vocab, (ROWS,))
    logits = logits.float().double()  # so that float32 shards start from the same numbers
    return logits, targets, *torch.randn(2, ROWS, dtype=torch.float64)


def linear_problem(valid_vocab):
    torch.manual_seed(valid_vocab)
    hidden = torch.randn(ROWS, HIDDEN).double()
    weight = torch.randn(PADDED_VOCAB, HIDDEN).double() * 0.3
    targets = torch.randint(0, valid_vocab, (ROWS,))
    log_p = (hidden @ weight[:valid_vocab].T / TEMPERATURE).log_softmax(-1)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    tokens = LossTokens(
        at=torch.arange(ROWS),
        targets=targets,
        old_logprobs=logprobs + torch.linspace(-0.5, 0.5, ROWS).double(),
        ref_logprobs=logprobs + 0.3 * torch.randn(ROWS).double(),
        advantages=torch.randn(ROWS).double(),
        weights=torch.full((ROWS,), 1 / ROWS).double(),
    )
    return hidden, weight, tokens


def head_of(logits, tp, valid_vocab):
    """A head whose logits are these: a unit vector as the hidden state of each row."""
    hidden = torch.eye(len(logits), dtype=logits.dtype)
    return Head(hidden=hidden, head_weight=logits.T, shard=my_shard(tp, valid_vocab))


def my_shard(tp, valid_vocab):
    return Shard(
        tp_group=dist.group.WORLD if tp > 1 else None,
        vocab_start=dist.get_rank() * PADDED_VOCAB // tp,
        valid_vocab=valid_vocab,
        temperature=TEMPERATURE,
    )


def my_part(tensor, tp, *, dim):
    return tensor.detach().chunk(tp, dim=dim)[dist.get_rank()].clone()
