"""The compiled ops with the vocabulary split over real ranks, against float64 unsplit."""

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks

from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.token_loss import linear_policy_loss
from megatron_rl.ops import backend, native
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.vocab_parallel import Shard
from megatron_rl.types import LossTokens

pytestmark = pytest.mark.skipif(not native.BUILT, reason=f"no native ops: {native.FAULT}")

ROWS, HIDDEN, VOCAB = 19, 24, 8 * 256
VALID_VOCABS = (VOCAB, 1301, 200)  # at 8 ranks: no padding, one rank cut, ranks of padding only
LOSS = (ClippedRatio(eps_high=0.28), SharedTerms(kl_coef=0.1, entropy_coef=0.05))
CPU = torch.device("cpu")


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_policy_loss_of_shards_equals_float64(tp):
    run_on_ranks(tp, check_policy_loss, tp)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_chunked_head_of_shards_equals_float64(tp):
    run_on_ranks(tp, check_chunked_head, tp)


def test_a_compiled_head_of_shards_is_one_graph_with_the_same_bits():
    run_on_ranks(2, check_compiled_head)


def check_policy_loss(tp: int) -> None:
    for valid_vocab in VALID_VOCABS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits, tokens = problem(valid_vocab, dtype)
            exact = losses_and_gradient("reference", logits.double(), tokens, valid_vocab)
            shard = logits.chunk(tp, dim=1)[dist.get_rank()].clone()
            loss, sums, logprobs, gradient = losses_and_gradient(
                "native", shard, tokens, valid_vocab, tp=tp
            )
            # 1e-5: the goal for log-probabilities of any vocabulary and layout
            torch.testing.assert_close(logprobs.double(), exact[2], atol=1e-5, rtol=0)
            torch.testing.assert_close(loss.double(), exact[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sums, exact[1], atol=1e-4, rtol=1e-5)
            mine = exact[3].chunk(tp, dim=1)[dist.get_rank()]
            best = (mine.to(dtype).double() - mine).norm()
            error = (gradient.double() - mine).norm()
            assert error <= 1.05 * best + 1e-5 * exact[3].norm()
            start = dist.get_rank() * VOCAB // tp
            assert (gradient[:, max(valid_vocab - start, 0) :] == 0).all()
            assert (gradient[2] == 0).all()  # no weight
            assert_equal_on_all_ranks(loss, sums, logprobs)


def losses_and_gradient(ops, logits, tokens, valid_vocab, *, tp=None):
    """Of a head whose logits are these: a unit vector as the hidden state of each row."""
    unit_vectors = torch.eye(len(logits), dtype=logits.dtype)
    result, (_, gradient) = head(ops, unit_vectors, logits.T, tokens, valid_vocab, tp=tp)
    return result.loss.detach(), result.sums, result.logprobs, gradient.T


def check_chunked_head(tp: int) -> None:
    for valid_vocab in VALID_VOCABS:
        torch.manual_seed(valid_vocab)
        hidden = torch.randn(ROWS, HIDDEN).double()
        weight = torch.randn(VOCAB, HIDDEN).double() / 5
        _, tokens = problem(valid_vocab, torch.float64)
        exact, exact_grads = head("reference", hidden, weight, tokens, valid_vocab, chunk_rows=100)
        mine = weight.chunk(tp)[dist.get_rank()].clone()
        for chunk_rows in (4, 100):
            result, (hidden_grad, weight_grad) = head(
                "native", hidden, mine, tokens, valid_vocab, chunk_rows=chunk_rows, tp=tp
            )
            dist.all_reduce(hidden_grad)  # as the mapping behind the LM head does
            torch.testing.assert_close(result.loss, exact.loss)
            torch.testing.assert_close(result.logprobs, exact.logprobs)
            torch.testing.assert_close(hidden_grad, exact_grads[0])
            torch.testing.assert_close(weight_grad, exact_grads[1].chunk(tp)[dist.get_rank()])
            shard = shard_of(tp, valid_vocab)
            again, _ = linear_logprobs(
                Head(hidden=hidden, head_weight=mine, shard=shard),
                tokens.targets,
                chunk_rows=chunk_rows,
            )
            has_weight = tokens.weights != 0
            assert torch.equal(again[has_weight], result.logprobs[has_weight])


def head(ops, hidden, weight, tokens, valid_vocab, *, chunk_rows=None, tp=None):
    """(results, gradients of hidden and weight); unsharded without a tp."""
    backend.choose(ops, CPU)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    shard = shard_of(tp, valid_vocab) if tp else shard_of(1, valid_vocab)._replace(vocab_start=0)
    result = linear_policy_loss(
        Head(hidden=leaves[0], head_weight=leaves[1], shard=shard),
        tokens,
        *LOSS,
        chunk_rows=chunk_rows,
    )
    result.loss.backward()
    backend.choose("auto", CPU)
    return result, (leaves[0].grad, leaves[1].grad)


def check_compiled_head() -> None:
    """The collective too; what inductor makes of such a graph is for tests of one process."""
    _, tokens = problem(VOCAB, torch.float32)
    leaves = torch.randn(ROWS, HIDDEN), torch.randn(VOCAB // 2, HIDDEN)

    def run(hidden, weight):
        sharded = Head(hidden=hidden, head_weight=weight, shard=shard_of(2, VOCAB))
        result = linear_policy_loss(sharded, tokens, *LOSS, chunk_rows=8)
        return result.loss, result.logprobs

    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        parts = [leaf.clone().requires_grad_() for leaf in leaves]
        loss, logprobs = function(*parts)
        loss.backward()
        found.append([loss.detach(), logprobs, *(part.grad for part in parts)])
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


def problem(valid_vocab, dtype):
    torch.manual_seed(valid_vocab)  # every rank builds the whole problem, then takes its part
    logits = (torch.randn(ROWS, VOCAB) * 4).to(dtype)
    logits[:, valid_vocab:] = 1e3  # padding that counted would swamp everything
    targets = torch.randint(0, valid_vocab, (ROWS,))
    log_p = (logits[:, :valid_vocab].double() / 0.7).log_softmax(-1)
    logprobs = log_p.gather(-1, targets[:, None])[:, 0]
    tokens = LossTokens(
        at=torch.arange(ROWS),
        targets=targets,
        old_logprobs=logprobs + 0.3 * torch.randn(ROWS),
        ref_logprobs=logprobs + 0.3 * torch.randn(ROWS),
        advantages=torch.randn(ROWS).double(),
        weights=torch.full((ROWS,), 1 / ROWS).double(),
    )
    tokens.weights[2] = 0.0
    return logits, tokens


def shard_of(tp, valid_vocab):
    return Shard(
        tp_group=dist.group.WORLD if tp > 1 else None,
        vocab_start=dist.get_rank() * VOCAB // tp,
        valid_vocab=valid_vocab,
        temperature=0.7,
    )


def assert_equal_on_all_ranks(*results):
    for result in results:
        everyones = [torch.empty_like(result) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, result)
        assert all(torch.equal(other, result) for other in everyones)
