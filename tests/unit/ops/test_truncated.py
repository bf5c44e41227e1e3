"""Tokens of top-k and top-p are samples of the truncated softmax, however a vocabulary is split."""

import math

import pytest
import torch
from draws import COLUMNS, VALID, logits_of, requests, sample_tokens
from torch import Tensor

from megatron_rl.ops import truncated as module
from megatron_rl.ops.philox import words_of_ids, words_of_tokens
from megatron_rl.ops.truncated import Truncated, Truncation, sample_truncated
from megatron_rl.ops.vocab_parallel import Shard

ONE = Shard(None, 0, VALID, 1.0)


def sample(logits: Tensor, shard: Shard, asked: tuple[Tensor, ...], *truncation) -> Truncated:
    return sample_truncated(logits, shard, *asked, truncation=Truncation(*truncation))


def test_what_is_left_by_hand():
    """Probabilities 0.4, 0.3, 0.2, 0.1 at places 3, 0, 4, 1."""
    logits = torch.tensor([[0.3, 0.1, 0.0, 0.4, 0.2]], dtype=torch.float64).log()
    asked, shard = requests(1, 1.0), Shard(None, 7, 12, 1.0)
    kept = {
        truncation: sample(logits, shard, asked, *truncation).support[0].tolist()
        for truncation in ((9, 1.0), (3, 1.0), (9, 0.7), (9, 0.71), (2, 0.5), (2, 0.6), (9, 0.01))
    }
    assert kept == {
        (9, 1.0): [10, 7, 11, 8, 9, -1, -1, -1, -1],
        (3, 1.0): [10, 7, 11],
        (9, 0.7): [10, 7, -1, -1, -1, -1, -1, -1, -1],
        (9, 0.71): [10, 7, 11, -1, -1, -1, -1, -1, -1],
        (2, 0.5): [10, -1],  # of the two that are left, the first has 4 of 7
        (2, 0.6): [10, 7],
        (9, 0.01): [10, -1, -1, -1, -1, -1, -1, -1, -1],
    }


def test_tokens_are_distributed_as_the_truncated_softmax():
    num, temperature = 20_000, 1.3
    logits = logits_of(1).expand(num, -1)
    found = sample(logits, ONE, requests(num, temperature), 30, 0.9)
    kept = found.support[0][found.support[0] >= 0]
    assert 5 < len(kept) < 30
    assert (found.support == found.support[0]).all()
    expected = num * (logits[0, kept] / temperature).softmax(0)
    counts = torch.bincount(found.tokens, minlength=COLUMNS)[kept]
    assert counts.sum() == num
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(kept) - 1
    assert expected.min() > 5
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_log_probs_are_those_of_the_truncated_softmax():
    logits, asked = logits_of(50), requests(50)
    asked[2][::3] = 1.5
    found = sample(logits, ONE, asked, 8, 0.8)
    for row, scale in enumerate(asked[2].tolist()):
        kept = found.support[row][found.support[row] >= 0]
        log_p = (logits[row, kept] / scale).log_softmax(0)
        expected = log_p[(kept == found.tokens[row]).nonzero().item()]
        torch.testing.assert_close(found.logprobs[row], expected, atol=0, rtol=1e-13)


def test_without_an_end_a_token_is_the_one_of_the_whole_vocabulary():
    logits, asked = logits_of(60), requests(60)
    found = sample(logits, ONE, asked, 1000, 1.0)
    tokens, logprobs = sample_tokens(logits, ONE, *asked)
    assert found.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(found.logprobs, logprobs, atol=0, rtol=1e-12)
    assert (found.support >= 0).sum(1).tolist() == [VALID] * 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_split_vocabulary_gives_the_same_tokens(tp, dtype, monkeypatch):
    """In 16 bits many logits are equal at the end of what is left."""
    columns = COLUMNS if tp < 8 else 130
    logits = torch.nn.functional.pad(logits_of(60, dtype), (0, columns - COLUMNS), value=50.0)
    logits[::2] = (logits[::2] * 2).round() / 2
    each = -(-columns // tp)
    asked, truncation = requests(60), Truncation(12, 0.9)
    parts = [
        module._best_of_shard(part, Shard(None, rank * each, VALID, 1.0), asked[2], 12)
        for rank, part in enumerate(logits.split(each, dim=1))
    ]
    monkeypatch.setattr(Shard, "is_whole", False)
    monkeypatch.setattr(module.dist, "get_world_size", lambda group: tp)
    monkeypatch.setattr(
        module.dist,
        "all_gather_into_tensor",
        lambda out, part, group: out.copy_(torch.cat(parts)),
    )
    split = Shard(object(), 0, VALID, 1.0)
    found = sample_truncated(logits, split, *asked, truncation=truncation)
    monkeypatch.undo()
    whole = sample_truncated(logits, ONE, *asked, truncation=truncation)
    assert found.tokens.tolist() == whole.tokens.tolist()
    assert found.support.tolist() == whole.support.tolist()
    assert torch.equal(found.logprobs, whole.logprobs)


def test_equal_logits_go_by_their_ids():
    logits = torch.zeros(1, 200, dtype=torch.bfloat16)
    logits[0, 1::2] = -0.0
    logits[0, 150] = 1.0
    found = sample(logits, Shard(None, 0, 200, 1.0), requests(1), 4)
    assert found.support.tolist() == [[150, 0, 1, 2]]


def test_a_logit_that_is_not_a_number_is_seen():
    logits = logits_of(3)
    logits[1, 4] = torch.nan
    assert sample(logits, ONE, requests(3), 5, 0.9).logprobs.isnan().tolist() == [
        False,
        True,
        False,
    ]


def test_words_of_some_ids_are_those_of_all():
    seeds, places, _ = requests(20)
    ids = torch.randint(COLUMNS, (20, 9), generator=torch.Generator().manual_seed(1))
    every = words_of_tokens(seeds, places, 0, COLUMNS)
    assert torch.equal(words_of_ids(seeds, places, ids), every.gather(1, ids))
