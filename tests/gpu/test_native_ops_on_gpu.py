"""The CUDA ops against the CPU ops and float64; `pytest -m gpu` runs them where there is a GPU."""

import pytest
import torch

from megatron_rl.megatron.gradients import MainGrad
from megatron_rl.objectives.cispo import Cispo
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.sapo import Sapo
from megatron_rl.objectives.token_loss import linear_policy_loss
from megatron_rl.ops import backend, native
from megatron_rl.ops.group_stats import (
    GROUP_ADVANTAGES,
    KEEP_RULES,
    group_stats,
    group_stats_definition,
)
from megatron_rl.ops.head import Head
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import Correction, SharedTerms
from megatron_rl.ops.native_loss import loss_arguments
from megatron_rl.ops.sample import draw_stats, draw_stats_definition
from megatron_rl.ops.support import keep_support
from megatron_rl.ops.truncated import Truncation, sample_truncated
from megatron_rl.ops.vocab_parallel import Shard
from megatron_rl.types import LossTokens

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(not native.has("row_stats", GPU), reason="built without CUDA ops"),
]
ops = torch.ops.megatron_rl

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# One block, clusters of 1, 2, 4 and 8, beyond the largest cluster, and rows that no pack fits.
VOCABS = [1, 17, 32, 1024, 20480, 20488, 50257, 81920, 128256, 151936, 163840, 163848, 200064]
FULL = (ClippedRatio(eps_high=0.28), SharedTerms(kl_coef=0.1, entropy_coef=0.05))
PLAIN = (ClippedRatio(), SharedTerms())
CUT = (Cispo(eps_low=0.1, eps_high=0.2), SharedTerms())
SOFT = (Sapo(), SharedTerms())
MASKED = (ClippedRatio(), SharedTerms(correction=Correction("token", "mask", 0.8, 1.2)))
LOSSES = {"entropy": FULL, "plain": PLAIN, "cispo": CUT, "sapo": SOFT, "masked": MASKED}


def problem(rows, vocab, dtype):
    torch.manual_seed(vocab)
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    targets = torch.randint(0, vocab, (rows,))
    logprobs = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    tokens = LossTokens(
        at=torch.arange(rows),
        targets=targets,
        old_logprobs=logprobs + 0.3 * torch.randn(rows),
        ref_logprobs=logprobs + 0.3 * torch.randn(rows),
        rollout_logprobs=logprobs + 0.3 * torch.randn(rows),
        advantages=torch.randn(rows).double(),
        weights=torch.rand(rows).double(),
    )
    tokens.weights[1] = 0.0
    return logits, tokens


def run(logits, tokens, loss):
    """Of a head whose logits are these: a unit vector as the hidden state of each row."""
    leaf = logits.T.contiguous().requires_grad_()
    head = Head(
        hidden=torch.eye(len(logits), dtype=logits.dtype, device=logits.device),
        head_weight=leaf,
        shard=Shard(None, 0, max(1, logits.size(1) - 3), 0.8),
    )
    result = linear_policy_loss(head, tokens.to(logits.device), *loss)
    result.loss.backward()
    return result.sums.cpu(), result.logprobs.cpu(), leaf.grad.T.cpu()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("is_whole", [True, False], ids=["one pass", "two passes"])
def test_loss_and_gradient_equal_float64(monkeypatch, vocab, dtype, loss, is_whole):
    logits, tokens = problem(5, vocab, dtype)
    tokens.targets.clamp_(max=max(0, vocab - 4))
    exact = run(logits.double(), tokens, loss)
    if not is_whole:
        monkeypatch.setattr(Shard, "is_whole", False)
    actual = run(logits.to(GPU), tokens, loss)
    torch.testing.assert_close(actual[0], exact[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual[1].double(), exact[1], atol=1e-5, rtol=0)
    best = (exact[2].to(dtype).double() - exact[2]).norm()
    assert (actual[2].double() - exact[2]).norm() <= 1.05 * best + 1e-5 * exact[2].norm()
    assert (actual[2][1] == 0).all()
    assert (actual[2][:, max(1, vocab - 3) :] == 0).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_passes_agree_bit_for_bit(vocab):
    logits, tokens = problem(7, vocab, torch.bfloat16)
    logits, targets = logits.to(GPU), tokens.targets.to(GPU)
    stats = ops.row_stats(logits, targets, None, 0, vocab, 1.0, False)
    parts = [
        ops.row_stats(logits[i : i + 1], targets[i : i + 1], None, 0, vocab, 1.0, False)
        for i in range(7)
    ]
    if vocab % 8 == 0:  # else rows start elsewhere in their 16 bytes
        assert torch.equal(torch.cat(parts), stats)
    old, _, _ = ops.merge_stats(stats[None])
    tokens = tokens.to(GPU).replace(old_logprobs=old, weights=tokens.weights.to(GPU) + 0.1)
    arguments = arguments_of(tokens, PLAIN, with_entropy=False)
    logprobs, *_ = ops.policy_loss_onepass_(logits, targets, *arguments, vocab, 1.0, 1.0)
    assert torch.equal(logprobs, old)  # the ratio of the first update is exactly 1


def arguments_of(tokens, loss, *, with_entropy):
    objective, shared = loss
    *arguments, _ = loss_arguments(tokens.constants(torch.float32), objective.native, shared)
    return (*arguments, with_entropy)


def test_offsets_beyond_31_bits_and_70_001_rows():
    rows, vocab = 70_001, 33_000
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device=GPU)
    targets = torch.randint(0, vocab, (rows,), device=GPU)
    stats = ops.row_stats(logits, targets, None, 0, vocab, 1.0, True)
    logprobs, _, lse = ops.merge_stats(stats[None])
    last = logits[-3:].double().log_softmax(-1)
    torch.testing.assert_close(
        logprobs[-3:].double(), last.gather(1, targets[-3:, None])[:, 0], atol=1e-5, rtol=0
    )
    one = torch.ones_like(lse)
    params = torch.stack([lse, one, 0 * one, -one], dim=1)
    ops.dlogits_(logits, targets, params, None, 0, vocab, 1.0)
    expected = -last.exp()
    expected.scatter_add_(1, targets[-3:, None], torch.ones_like(expected[:, :1]))
    torch.testing.assert_close(logits[-3:].double(), expected, atol=1e-8, rtol=2.0**-8)


def head_of(hidden, weight, vocab, buffer=None):
    shard = Shard(None, 0, vocab, 1.0)
    return Head(hidden=hidden, head_weight=weight, shard=shard, gradient_buffer=buffer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunked_head_agrees_with_the_cpu_and_with_the_pass_without_gradient(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64), torch.randn(1024, 64) / 8
    _, tokens = problem(50, 1000, torch.float32)
    grads = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        head = head_of(*leaves, 1000)
        result = linear_policy_loss(head, tokens.to(device), *PLAIN, chunk_rows=16)
        result.loss.backward()
        grads.append([leaf.grad.float().cpu() for leaf in leaves])
    with torch.no_grad():
        again, _ = linear_logprobs(head, tokens.targets.to(GPU), chunk_rows=16)
    has_weight = tokens.weights.to(GPU) != 0
    assert torch.equal(again[has_weight], result.logprobs[has_weight])
    # products of bfloat16 differ by its rounding (2^-8) and by that of the logits (0.02 at 3)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for on_cpu, on_gpu in zip(*grads, strict=True):
        assert (on_cpu - on_gpu).norm() <= tolerance * on_cpu.norm()


@pytest.mark.parametrize("ops_backend", ["native", "reference"])
def test_the_gradient_of_the_head_goes_into_main_grad_and_nowhere_else(ops_backend):
    torch.manual_seed(0)
    rows, vocab, hidden_size, chunk = 64, 50_000, 512, 16
    hidden = torch.randn(rows, hidden_size).bfloat16()
    weight = (torch.randn(vocab, hidden_size) / 22).bfloat16()
    _, tokens = problem(rows, vocab, torch.float32)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    linear_policy_loss(head_of(*exact, vocab), tokens, *PLAIN, chunk_rows=chunk).loss.backward()

    backend.choose(ops_backend, GPU)
    tokens = tokens.to(GPU)
    leaves = [x.to(GPU).requires_grad_() for x in (hidden, weight)]
    leaves[1].main_grad = torch.ones(vocab, hidden_size, device=GPU)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error" if ops_backend == "native" else "default")
    try:
        head = head_of(*leaves, vocab, MainGrad(leaves[1]))
        linear_policy_loss(head, tokens, *PLAIN, chunk_rows=chunk).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        backend.choose("auto", GPU)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < vocab * hidden_size * 2  # one of the head's own size, in 16 bits
    assert leaves[1].grad_added_to_main_grad
    assert leaves[1].grad._nnz() == 0
    added = (leaves[1].main_grad - 1).double().cpu()
    assert (added - exact[1].grad).norm() <= 0.05 * exact[1].grad.norm()


def test_a_scaled_loss_makes_main_grad_nan():
    _, tokens = problem(8, 1000, torch.float32)
    weight = torch.randn(1000, 64, device=GPU).bfloat16().requires_grad_()
    weight.main_grad = torch.zeros(1000, 64, device=GPU)
    hidden = torch.randn(8, 64, device=GPU).bfloat16()
    head = head_of(hidden, weight, 1000, MainGrad(weight))
    (linear_policy_loss(head, tokens.to(GPU), *PLAIN).loss / 2).backward()
    assert weight.main_grad.isnan().all()


@pytest.mark.parametrize("rules", [(), *((rule,) for rule in KEEP_RULES)])
@pytest.mark.parametrize("advantage", GROUP_ADVANTAGES)
def test_group_stats_equal_the_definition(rules, advantage):
    torch.manual_seed(0)
    sizes = torch.randint(0, 90, (10_000,))
    offsets = torch.cat([torch.zeros(1).long(), sizes.cumsum(0)])
    rewards = torch.randint(0, 3, (int(offsets[-1]),)).double() * 0.1
    rewards[::1001] = torch.nan
    settings = {"keep": rules, "advantage": advantage, "std_eps": 1e-6}
    expected = group_stats_definition(rewards, offsets, **settings)
    actual = group_stats(rewards.to(GPU), offsets.to(GPU), **settings)
    for name in expected.__slots__:
        torch.testing.assert_close(
            getattr(actual, name).cpu(), getattr(expected, name), atol=1e-12, rtol=1e-12,
            equal_nan=True,
        )  # fmt: skip


@pytest.mark.parametrize("advantage", ["reward_minus_mean", "group_norm", "leave_one_out"])
def test_equal_rewards_have_exactly_no_advantage(advantage):
    sizes = torch.arange(2, 1002)
    rewards = torch.full((int(sizes.sum()),), 0.1, dtype=torch.float64, device=GPU)
    offsets = torch.cat([torch.zeros(1).long(), sizes.cumsum(0)]).to(GPU)
    stats = group_stats(rewards, offsets, advantage=advantage, std_eps=1e-6)
    assert (stats.advantages == 0).all()


def test_no_op_waits_for_the_device_and_all_can_be_captured():
    logits, tokens = problem(5, 1024, torch.bfloat16)
    logits, targets = logits.to(GPU), tokens.targets.to(GPU)
    arguments = arguments_of(tokens.to(GPU), FULL, with_entropy=True)
    work, scale = logits.clone(), torch.ones((), device=GPU)
    rewards, offsets = torch.randn(8, device=GPU).double(), torch.tensor([0, 3, 8], device=GPU)

    def everything():
        work.copy_(logits)
        stats = ops.row_stats(work, targets, None, 0, 1024, 1.0, True)
        ops.merge_stats(stats[None])
        params = ops.token_loss(stats[None], *arguments, 1.0)[2]
        gradient = ops.dlogits(work, targets, params, scale, 0, 1024, 1.0)
        ops.policy_loss_onepass_(work, targets, *arguments, 1024, 1.0, 1.0)
        ops.rescale_if_(work, scale, 1.0)
        ops.group_stats(rewards, offsets, 1, 7, 3, 1e-6)
        return gradient

    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert torch.equal(work, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_draw_stats(vocab, dtype):
    """A token may be another one where two are nearly equal, which is rare."""
    torch.manual_seed(vocab)
    logits = (torch.randn(64, vocab) * 2).to(dtype)
    temperatures = torch.full((64,), 0.7, dtype=torch.float64)
    temperatures[::5] = 0.0
    asked = (torch.randint(2**62, (64,)), torch.arange(64), temperatures)
    shard = Shard(None, 3, vocab + 2, 1.0)  # the last column is padding
    found = draw_stats(logits.to(GPU), shard, *(x.to(GPU) for x in asked)).cpu()
    expected = draw_stats_definition(logits, shard, *asked)
    is_same = found[:, 4] == expected[:, 4]
    assert is_same.sum() >= 63
    torch.testing.assert_close(found[is_same], expected[is_same], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_truncated_softmax_is_that_of_the_cpu(dtype):
    torch.manual_seed(0)
    logits, shard = (torch.randn(64, 50_257) * 2).to(dtype), Shard(None, 3, 50_259, 1.0)
    asked = (torch.randint(2**62, (64,)), torch.arange(64), torch.full((64,), 0.7).double())
    truncation = Truncation(20, 0.9)
    on_cpu = sample_truncated(logits, shard, *asked, truncation=truncation)
    on_gpu = sample_truncated(
        logits.to(GPU), shard, *(x.to(GPU) for x in asked), truncation=truncation
    )
    is_same = (on_gpu.support.cpu() == on_cpu.support).all(1)
    assert is_same.sum() >= 62  # where the last ones are nearly equal, another one may be left
    assert torch.equal(on_gpu.tokens.cpu()[is_same], on_cpu.tokens[is_same])
    support, expected = on_cpu.support.int(), logits.clone()
    keep_support(expected, support, shard)
    moved, support = logits.to(GPU), support.to(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = keep_support(moved, support, shard)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
