"""A softmax over a part of the vocabulary: against one in PyTorch that has just these tokens."""

from dataclasses import replace

import pytest
import torch
from heads import head_of
from torch import Tensor

from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.gspo import Gspo
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.token_loss import linear_policy_loss, token_loss
from megatron_rl.ops.linear_logprobs import linear_logprobs
from megatron_rl.ops.loss_spec import SharedTerms
from megatron_rl.ops.support import keep_support
from megatron_rl.ops.vocab_parallel import Shard, merge_stats, shard_stats
from megatron_rl.types import LossTokens

ROWS, VOCAB, VALID = 40, 150, 140
TERMS = SharedTerms(kl_coef=0.1, entropy_coef=0.05)
OBJECTIVES = {"grpo": ClippedRatio(eps_high=0.28), "raft": Likelihood(), "gspo": Gspo()}


def problem(dtype: torch.dtype) -> tuple[Tensor, LossTokens]:
    """Rows of 1 to 9 tokens; the first one has the drawn token alone."""
    draw = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(ROWS, VOCAB, generator=draw)
    support = torch.full((ROWS, 9), -1, dtype=torch.int32)
    for row in range(ROWS):
        ids = torch.randperm(VALID, generator=draw)[: 1 + row % 9]
        support[row, : len(ids)] = ids
    targets = support[:, 0].long()
    kept = [row[ids[ids >= 0].long()] for row, ids in zip(logits, support, strict=True)]
    near = torch.stack([one[0] / 0.8 - (one / 0.8).logsumexp(0) for one in kept]).double()
    near += 0.4 * torch.randn(ROWS, generator=draw)
    tokens = LossTokens(
        at=torch.arange(ROWS),
        targets=targets,
        support=support,
        old_logprobs=near,
        ref_logprobs=near - 0.3,
        advantages=torch.randn(ROWS, generator=draw).double(),
        weights=torch.rand(ROWS, generator=draw).double() / ROWS,
    )
    return logits.to(dtype), tokens


def expected(logits: Tensor, tokens: LossTokens, objective, temperature: float):
    """(loss, gradient of the logits, log-probs, entropies) in float64 by autograd."""
    leaf = logits.double().clone().requires_grad_()
    logprobs, entropies = [], []
    for row, ids, target in zip(leaf / temperature, tokens.support, tokens.targets, strict=True):
        kept = ids[ids >= 0].long()
        log_p = row[kept].log_softmax(0)
        logprobs.append(log_p[(kept == target).nonzero().item()])
        entropies.append(-(log_p.exp() * log_p).sum())
    scored = torch.stack(logprobs), torch.stack(entropies)
    lengths = torch.tensor([ROWS - 7, 7])
    result = token_loss(*scored, tokens, objective, TERMS, responses=lengths)
    result.loss.backward()
    return result.loss.detach(), leaf.grad, *(x.detach() for x in scored)


@pytest.mark.parametrize("passes", ["one pass", "two passes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_the_tokens_that_are_left(name, dtype, passes, monkeypatch):
    if passes == "two passes":
        monkeypatch.setattr(Shard, "is_whole", False)
    logits, tokens = problem(dtype)
    loss, gradient, _, _ = expected(logits, tokens, OBJECTIVES[name], 0.8)
    head = head_of(logits.clone(), valid_vocab=VALID, temperature=0.8)
    leaf = head.head_weight.contiguous().requires_grad_()
    head = replace(head, head_weight=leaf, support=tokens.support)
    lengths = torch.tensor([ROWS - 7, 7])
    result = linear_policy_loss(
        head, tokens, OBJECTIVES[name], TERMS, responses=lengths, chunk_rows=16
    )
    result.loss.backward()
    close = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(result.loss.double(), loss, atol=close, rtol=close)
    found = leaf.grad.T
    assert found.isfinite().all()
    scale = gradient.abs().max()
    torch.testing.assert_close(found.double() / scale, gradient / scale, atol=close, rtol=0)
    outside = torch.ones(ROWS, VOCAB + 1, dtype=torch.bool)
    outside.scatter_(1, tokens.support.long().where(tokens.support >= 0, VOCAB), value=False)
    assert not found[outside[:, :VOCAB]].any()
    assert found[0].abs().max() < close  # a token that had no alternative teaches nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probs_and_entropies_are_those_of_the_tokens_that_are_left(dtype):
    logits, tokens = problem(dtype)
    _, _, logprobs, entropies = expected(logits, tokens, OBJECTIVES["grpo"], 0.8)
    head = replace(head_of(logits, valid_vocab=VALID, temperature=0.8), support=tokens.support)
    with torch.no_grad():
        found = linear_logprobs(head, tokens.targets, chunk_rows=16)
    close = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0].double(), logprobs, atol=close, rtol=close)
    torch.testing.assert_close(found[1].double(), entropies, atol=close, rtol=close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_split_vocabulary_has_the_same_log_probs(dtype):
    """Most shards have none of a row's tokens, and the last is padding alone."""
    logits, tokens = problem(dtype)
    _, _, logprobs, entropies = expected(logits, tokens, OBJECTIVES["grpo"], 1.0)
    stats = []
    for start in range(0, 200, 10):
        own = torch.nn.functional.pad(logits, (0, 50), value=60.0)[:, start : start + 10].clone()
        shard = Shard(None, start, VALID, 1.0)
        kept = keep_support(own, tokens.support, shard)
        assert kept is own
        stats.append(shard_stats(kept, tokens.targets, shard))
    found = merge_stats(torch.stack(stats))
    close = 1e-13 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0].double(), logprobs, atol=close, rtol=close)
    torch.testing.assert_close(found[1].double(), entropies, atol=close, rtol=close)


def test_what_is_left_of_logits():
    logits = torch.arange(8.0).view(2, 4) + 1
    support = torch.tensor([[12, 10, 9], [13, -1, -1]], dtype=torch.int32)
    lost = -torch.inf
    found = keep_support(logits.clone(), support, Shard(None, 10, 90, 1.0))
    assert found.tolist() == [[1.0, lost, 3.0, lost], [lost, lost, lost, 8.0]]
    assert torch.equal(keep_support(logits.clone(), None, Shard(None, 10, 90, 1.0)), logits)


def test_a_logit_that_is_not_a_number_is_not_hidden():
    logits = torch.tensor([[1.0, torch.nan, 3.0]])
    found = keep_support(logits, torch.tensor([[0, 1]]), Shard(None, 0, 3, 1.0))
    assert found.isnan().tolist() == [[False, True, False]]
