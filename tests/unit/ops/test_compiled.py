"""torch.compile over the ops and over what autograd sees of them: one graph, the same numbers.

fullgraph=True makes an error of every break of the graph; where there is one, it is counted. Of the
definitions, which are plain torch, the chunked head stands for all: it calls every other one.
"""

import os
import shutil

import pytest
import torch

from megatron_rl.megatron.gradients import MainGrad
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.token_loss import linear_policy_loss
from megatron_rl.ops.group_stats import group_stats
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.vocab_parallel import Shard
from megatron_rl.types import LossTokens

COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"inductor needs {COMPILER}"),
]
ops = torch.ops.megatron_rl

ROWS, VOCAB, HIDDEN = 5, 33, 8
SHARD = Shard(tp_group=None, vocab_start=0, valid_vocab=30, temperature=0.7)
LOSS = (ClippedRatio(), SharedTerms(kl_coef=0.1, entropy_coef=0.05))
# Inductor fuses the definitions anew, and contracts a product and a sum to one rounding.
CLOSE = {"reference": {"atol": 2e-6, "rtol": 1e-5}, "native": {"atol": 0, "rtol": 0}}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Nothing compiled by an earlier run, and nothing left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()


def problem():
    torch.manual_seed(0)
    tokens = LossTokens(
        at=torch.arange(ROWS),
        targets=torch.randint(0, 30, (ROWS,)),
        old_logprobs=-2 * torch.rand(ROWS),
        ref_logprobs=-2 * torch.rand(ROWS),
        rollout_logprobs=-2 * torch.rand(ROWS),
        advantages=torch.randn(ROWS),
        weights=torch.rand(ROWS),
    )
    tokens.weights[1] = 0.0
    return tokens


def assert_compiles(run, shapes, close):
    """run(*leaves) -> (loss, results); its compiled form has the same loss, results, gradients."""
    torch.manual_seed(1)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    found = []
    for function in (run, torch.compile(run, fullgraph=True)):
        loss, *results = function(*leaves)
        gradients = torch.autograd.grad(loss, leaves)
        found.append([loss.detach(), *results, *gradients])
    torch.testing.assert_close(found[1], found[0], **close)
    assert all(gradient.abs().sum() > 0 for gradient in found[1][-len(leaves) :])


def head(hidden, weight, buffer=None):
    return Head(hidden=hidden, head_weight=weight, shard=SHARD, gradient_buffer=buffer)


@pytest.mark.parametrize("is_whole", [True, False])
def test_chunked_head(ops_backend, is_whole, monkeypatch):
    tokens = problem()
    if not is_whole:
        monkeypatch.setattr(Shard, "is_whole", False)

    def run(hidden, weight):
        result = linear_policy_loss(head(hidden * 1.5, weight), tokens, *LOSS, chunk_rows=2)
        return result.loss * 2.0, result.logprobs, result.sums, result.extrema

    assert_compiles(run, [(ROWS, HIDDEN), (VOCAB, HIDDEN)], CLOSE[ops_backend])


def test_a_gradient_in_main_grad(native_only):
    """Graphs know no sparse gradient, so the head runs between two of them."""
    tokens = problem()
    hidden, start = torch.randn(ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN)

    def gradients(compiles):
        weight = torch.nn.Parameter(start.clone())
        weight.main_grad = torch.ones(VOCAB, HIDDEN)
        weight.grad_added_to_main_grad = False
        leaf = hidden.clone().requires_grad_()

        def run(leaf):
            buffered = head(leaf * 1.5, weight, MainGrad(weight))
            return linear_policy_loss(buffered, tokens, *LOSS, chunk_rows=2).loss

        compiled = torch.compile(run) if compiles else run
        for _ in range(2):
            compiled(leaf).backward()
            assert weight.grad_added_to_main_grad
            weight.grad, weight.grad_added_to_main_grad = None, False  # as Megatron's DDP does
        return leaf.grad, weight.main_grad

    expected = gradients(compiles=False)
    assert expected[1].std() > 0
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(gradients(compiles=True), expected, atol=0, rtol=0)
    # In one place; torch 2.13 says that its gradient is sparse, 2.11 that it writes to main_grad.
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1


def test_logprobs_for_any_loss(ops_backend):
    tokens = problem()

    def run(hidden, weight):
        logprobs, entropy = linear_logprobs(head(hidden * 1.5, weight), tokens.targets)
        return (logprobs.square() + entropy).sum(), logprobs.detach(), entropy.detach()

    assert_compiles(run, [(ROWS, HIDDEN), (VOCAB, HIDDEN)], CLOSE[ops_backend])


def test_passes_without_gradient(native_only):
    tokens = problem()

    def run(hidden, weight):
        with torch.no_grad():
            return linear_logprobs(head(hidden, weight), tokens.targets, chunk_rows=2)

    leaves = torch.randn(ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN)
    compiled = torch.compile(run, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, run(*leaves), **CLOSE["native"])


def test_group_stats(native_only):
    """The definition needs the sizes of the groups, which are data: no single graph holds it."""
    offsets = torch.tensor([0, 2, 5])

    def run(rewards):
        stats = group_stats(rewards, offsets, keep=["drop_uniform"], advantage="group_norm")
        return stats.keep, stats.advantages

    rewards = torch.tensor([1.0, -1.0, 0.3, 0.3, 0.3])
    compiled = torch.compile(run, fullgraph=True)(rewards)
    torch.testing.assert_close(compiled, run(rewards), atol=0, rtol=0)


def test_every_native_op(native_only):
    tokens = problem()
    targets = tokens.targets
    arguments = (
        tokens.old_logprobs, tokens.ref_logprobs, tokens.rollout_logprobs, tokens.advantages,
        tokens.weights, 1, 0.2, 0.28, None, 0.1, 2, 0.05, 0.5, 1.5, True, True,
    )  # fmt: skip

    def everything(logits, rewards, offsets, factor):
        logits = logits * 1.5
        stats = ops.row_stats(logits, targets, None, 0, 30, 1.0, True)
        merged = ops.merge_stats(stats[None])
        losses = ops.token_loss(stats[None], *arguments, 1.0)
        gradient = ops.dlogits(logits, targets, losses[2], None, 0, 30, 1.0)
        in_place, one_pass = logits.clone(), logits.clone()
        ops.dlogits_(in_place, targets, losses[2], None, 0, 30, 1.0)
        in_one_pass = ops.policy_loss_onepass_(one_pass, targets, *arguments, 30, 1.0, 1.0)
        ops.rescale_if_(one_pass, factor, 1.0)
        judged = ops.group_stats(rewards, offsets, 1, 6, 3, 1e-6)
        return merged, losses, gradient, in_place, one_pass, in_one_pass, judged

    tensors = (
        torch.randn(ROWS, VOCAB), torch.randn(ROWS).double(), torch.tensor([0, 2, 5]),
        torch.tensor(0.5),
    )  # fmt: skip
    compiled = torch.compile(everything, fullgraph=True)(*tensors)
    expected = everything(*tensors)
    torch.testing.assert_close(compiled, expected, atol=0, rtol=0)
    assert torch.equal(expected[4], 0.5 * expected[2])


def test_every_part_of_a_layer(native_only):
    x, weight, angles = torch.randn(4, 16), torch.randn(16), torch.randn(4, 1, 4)
    places = torch.tensor([0, 2, 1, 4])

    def everything(x, keys, values):
        x = x * 1.5
        heads, keys, values = x.unflatten(1, (2, 8)), keys.clone(), values.clone()
        normed, inverse = ops.rms_norm(x, weight, 1e-6)
        through = ops.swiglu(x)
        turned = ops.turn(heads, angles, angles, 1)
        attended = ops.attend_next_(turned, turned, heads, keys, values, places, 0.5, 2)
        gradients = ops.rms_norm_backward(x, normed, weight, inverse)
        drawn = ops.draw_from_head(x, x, places, places, places.double(), 0, 4)
        return drawn, gradients, ops.swiglu_backward(through, x), attended, keys, values

    tensors = x, torch.randn(4, 2, 5, 8), torch.randn(4, 2, 5, 8)
    compiled = torch.compile(everything, fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled, everything(*tensors), atol=0, rtol=0)
