"""Tokens that one op draws from hidden states and the head, against float64."""

import pytest
import torch

from megatron_rl.ops import sample
from megatron_rl.ops.sample import draw_stats_definition, merge_draws, sample_from_head
from megatron_rl.ops.vocab_parallel import Shard

pytestmark = pytest.mark.usefixtures("native_only")
ops = torch.ops.megatron_rl

SIZES = [  # rows, hidden, columns: of a tile and a block of each kind, and what is left of them
    (1, 1, 1),
    (3, 16, 15),
    (8, 32, 48),
    (13, 33, 97),
    (21, 64, 13_000),
    (1, 8, 140_000),
]


def problem(rows, hidden, columns):
    draw = torch.Generator().manual_seed(rows * columns)
    states = torch.randn(rows, hidden, generator=draw)
    weight = torch.randn(columns, hidden, generator=draw)
    seeds = torch.randint(2**62, (rows,), generator=draw)
    temperatures = torch.full((rows,), 0.7, dtype=torch.float64)
    temperatures[::3] = 0.0
    return states, weight, (seeds, torch.arange(rows), temperatures)


@pytest.mark.parametrize(("rows", "hidden", "columns"), SIZES)
@pytest.mark.parametrize(("start", "padding"), [(0, 0), (1234, 1), (7, 10**6)])
def test_what_it_draws_and_says_of_a_row(rows, hidden, columns, start, padding):
    states, weight, asked = problem(rows, hidden, columns)
    shard = Shard(None, start, start + columns - padding, 1.0)
    found = ops.draw_from_head(states, weight, *asked, start, shard.valid_vocab)
    logits = states.double() @ weight.double().T
    expected = draw_stats_definition(logits, shard, *asked)
    assert found[:, 4].tolist() == expected[:, 4].tolist()
    close = {"atol": 2e-5 * max(1.0, logits.abs().max().item()), "rtol": 0}
    torch.testing.assert_close(found[:, [0, 2, 3]], expected[:, [0, 2, 3]], **close)
    torch.testing.assert_close(found[:, 1], expected[:, 1], atol=0, rtol=1e-3)


def test_log_probs_are_those_of_the_softmax():
    states, weight, asked = problem(21, 64, 13_000)
    found = ops.draw_from_head(states, weight, *asked, 0, 13_000)
    tokens, logprobs = merge_draws(found[None])
    temperatures = asked[2].where(asked[2] > 0, 1.0)
    whole = (states.double() @ weight.double().T / temperatures[:, None]).log_softmax(1)
    torch.testing.assert_close(logprobs, whole.gather(1, tokens[:, None])[:, 0], atol=2e-5, rtol=0)


def test_a_row_alone_is_what_it_is_among_others_on_any_number_of_threads():
    """Its blocks have other columns then, so what is added up over them is rounded otherwise."""
    states, weight, asked = problem(21, 64, 13_000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = ops.draw_from_head(states, weight, *asked, 0, 13_000)
        torch.set_num_threads(1)
        assert torch.equal(ops.draw_from_head(states, weight, *asked, 0, 13_000), found)
    finally:
        torch.set_num_threads(threads)
    alone = ops.draw_from_head(states[4:5], weight, *(x[4:5] for x in asked), 0, 13_000)
    assert torch.equal(alone[:, [0, 2, 3, 4]], found[4:5, [0, 2, 3, 4]])
    torch.testing.assert_close(alone[:, 1], found[4:5, 1], atol=0, rtol=1e-6)


def test_it_runs_where_hidden_states_are_few(monkeypatch):
    states, weight, asked = problem(21, 64, 13_000)
    shard = Shard(None, 0, 13_000, 1.0)
    monkeypatch.setattr(sample.native, "has_wide_vectors", lambda: True)
    tokens, logprobs = sample_from_head(states, weight, shard, *asked)
    wanted = merge_draws(ops.draw_from_head(states, weight, *asked, 0, 13_000)[None])
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(logprobs, wanted[1].float())
    monkeypatch.setattr(sample, "MOST_STATES", 0)
    assert torch.equal(sample_from_head(states, weight, shard, *asked)[0], tokens)


def test_what_it_does_not_take_is_said():
    states, weight, asked = problem(3, 16, 15)
    with pytest.raises(RuntimeError, match=r"weight: expected shape \[15, 16\], got shape \[15, 8"):
        ops.draw_from_head(states, weight[:, :8].contiguous(), *asked, 0, 15)
    with pytest.raises(RuntimeError, match="hidden: expected float32, got float64"):
        ops.draw_from_head(states.double(), weight, *asked, 0, 15)
