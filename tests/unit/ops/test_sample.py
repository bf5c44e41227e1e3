"""Tokens are samples of the softmax, whoever else is sampled and however a vocabulary is split."""

import math

import pytest
import torch
from draws import COLUMNS, VALID, logits_of, requests, sample_tokens

from megatron_rl.ops import sample
from megatron_rl.ops.philox import philox
from megatron_rl.ops.sample import draw_stats, draw_stats_definition, merge_draws
from megatron_rl.ops.vocab_parallel import Shard

ONE = Shard(None, 0, VALID, 1.0)
# Of the authors' own table of known answers: counter, key, words.
KNOWN = (
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_words_of_its_authors(counter, key, words):
    found = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in found) == words


@pytest.mark.parametrize("varied", ["seeds", "places"])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_tokens_are_distributed_as_the_softmax(varied, temperature):
    """Pearson's chi-square over the tokens that are expected 5 times and more."""
    num = 20_000
    logits = logits_of(1).expand(num, -1)
    seeds, places, temperatures = requests(num, temperature)
    if varied == "seeds":
        places = torch.full_like(places, 7)
    else:
        seeds, places = torch.full_like(seeds, 2**61 + 5), torch.arange(num)
    tokens, _ = sample_tokens(logits, ONE, seeds, places, temperatures)
    expected = num * (logits[0, :VALID] / temperature).softmax(0)
    counts = torch.bincount(tokens, minlength=COLUMNS)
    assert not counts[VALID:].any()
    often = expected >= 5
    found = torch.cat([counts[:VALID][often].double(), counts[:VALID][~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    chi_square = float(((found - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_log_probs_are_those_of_the_softmax_at_the_temperature():
    logits = logits_of(50)
    seeds, places, temperatures = requests(50)
    temperatures[::3] = 1.5
    tokens, logprobs = sample_tokens(logits, ONE, seeds, places, temperatures)
    whole = (logits[:, :VALID] / temperatures[:, None]).log_softmax(1)
    torch.testing.assert_close(logprobs, whole.gather(1, tokens[:, None])[:, 0], atol=0, rtol=1e-13)


def test_a_temperature_of_0_takes_the_most_probable_token_and_its_log_prob_at_1():
    logits = logits_of(50)
    seeds, places, temperatures = requests(50)
    temperatures[::2] = 0.0
    tokens, logprobs = sample_tokens(logits, ONE, seeds, places, temperatures)
    greedy = logits[::2, :VALID]
    assert tokens[::2].tolist() == greedy.argmax(1).tolist() != tokens[1::2].tolist()
    torch.testing.assert_close(logprobs[::2], greedy.log_softmax(1).amax(1), atol=0, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_a_split_vocabulary_gives_the_same_tokens(tp, dtype):
    """With 8 ranks the shards begin inside of a group of four words, and some are padding alone."""
    columns = COLUMNS if tp < 8 else 130
    logits = torch.nn.functional.pad(logits_of(60, dtype), (0, columns - COLUMNS), value=50.0)
    each = -(-columns // tp)
    shards = logits.split(each, dim=1)
    asked = requests(60)
    gathered = torch.stack(
        [
            draw_stats(part, Shard(None, rank * each, VALID, 1.0), *asked)
            for rank, part in enumerate(shards)
        ]
    )
    tokens, logprobs = merge_draws(gathered)
    whole_tokens, whole_logprobs = sample_tokens(logits, ONE, *asked)
    assert tokens.tolist() == whole_tokens.tolist()
    torch.testing.assert_close(logprobs.to(whole_logprobs), whole_logprobs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 7])
def test_blocks_of_columns_give_the_tokens_of_all_logits(monkeypatch, dtype, start):
    """The last blocks are padding in part, and alone."""
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 16, generator=draw, dtype=dtype)
    weight = torch.randn(130, 16, generator=draw, dtype=dtype)
    of_rows = torch.arange(20).repeat_interleave(3)
    shard = Shard(None, start, start + 95, 1.0)
    asked = requests(60)
    asked[2][::4] = 0.0
    monkeypatch.setattr(sample, "MANY_ROWS", 60)
    monkeypatch.setattr(sample, "COLUMNS_OF_A_BLOCK", 31)
    tokens, logprobs = sample.sample_from_head(hidden, weight, shard, *asked, of_rows=of_rows)
    logits = (hidden @ weight.T).repeat_interleave(3, dim=0)
    wanted, their_logprobs = sample_tokens(logits, shard, *asked)
    assert tokens.tolist() == wanted.tolist()
    torch.testing.assert_close(logprobs, their_logprobs, atol=2e-6, rtol=2e-6)


def test_a_token_does_not_depend_on_who_else_is_sampled():
    logits, asked = logits_of(40, torch.float32), requests(40)
    tokens, _ = sample_tokens(logits, ONE, *asked)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:11]
    alone, _ = sample_tokens(logits[order], ONE, *(x[order] for x in asked))
    assert alone.tolist() == tokens[order].tolist()


def test_noise_of_seeds_and_places_is_another_one():
    logits = logits_of(1).expand(200, -1)
    seeds, places, temperatures = requests(200)
    tokens, _ = sample_tokens(logits, ONE, seeds, places, temperatures)
    for other in ((seeds + 2**32, places), (seeds, places + 1)):
        differ, _ = sample_tokens(logits, ONE, *other, temperatures)
        assert (differ != tokens).sum() > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_runs_equals_the_definition(dtype):
    """The native op, where it was compiled; 5 columns so that ids, sums and scores are seen."""
    logits, asked = logits_of(300, dtype), requests(300)
    asked[2][::5] = 0.0
    shard = Shard(None, 7, VALID + 7, 1.0)
    found = draw_stats(logits, shard, *asked)
    expected = draw_stats_definition(logits, shard, *asked)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
