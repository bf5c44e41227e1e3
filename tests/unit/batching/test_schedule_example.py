"""The worked examples of batching/schedule.py and balance.py, as tests."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_rl.batching import schedule
from megatron_rl.batching.balance import balance, fill_rows
from megatron_rl.batching.messages import decode
from megatron_rl.batching.schedule import Length, Together, _key, _replicas, distribute, rows_of
from megatron_rl.parallel.layout import Layout
from megatron_rl.types import Sample

LENGTHS = {(0, 7, 0): 5, (0, 7, 1): 4, (0, 8, 0): 3}
PARTS = {key: Length(1, length - 1) for key, length in LENGTHS.items()}
EVERYWHERE = torch.tensor([(*key, *length, True) for key, length in PARTS.items()])


def sample(key):
    update, group_id, index = key
    return Sample(
        group_id=group_id,
        index=index,
        update=update,
        prompt_tokens=torch.tensor([1]),
        response_tokens=torch.arange(LENGTHS[key]),  # of which the last is no input
        advantage=0.5,
    )


FIRST, SECOND, THIRD = (sample(key) for key in LENGTHS)


@pytest.fixture
def sent(monkeypatch):
    """(key, receiver) of each sample that is sent; the other ranks' lengths are known."""
    messages = []

    def send(vectors, to_ranks, group):
        messages.extend(
            (_key(sample), rank)
            for vector, rank in zip(vectors, to_ranks, strict=True)
            for sample in decode(vector)
        )
        return torch.cat([torch.empty(0, dtype=torch.int64), *vectors])

    monkeypatch.setattr(schedule, "gather_rows", lambda own, group: EVERYWHERE)
    monkeypatch.setattr(schedule, "send_messages", send)
    return messages


def groups(rank=0, **layout):
    return SimpleNamespace(layout=Layout(**layout), world=None, rank=rank)


def test_one_sample_of_three_travels(sent):
    found = distribute([FIRST, SECOND], groups(world_size=2, tp=1, pp=1))
    assert found.num_samples == {0: 3}
    assert found.samples[0] is FIRST
    assert sent == [((0, 7, 1), 1)]
    sent.clear()
    assert distribute([THIRD], groups(rank=1, world_size=2, tp=1, pp=1)).samples == [THIRD]
    assert sent == []


def test_a_prompt_that_stands_again_is_counted_once_a_response(sent):
    """Two responses of group 7 and one of group 8, in one update."""
    found = distribute([FIRST, SECOND], groups(world_size=2, tp=1, pp=1))
    assert found.num_tokens == 5 + 4 + 3
    assert found.num_repeated == 1  # all prompts have one token


def test_an_update_without_a_gradient_counts_as_empty(sent, monkeypatch):
    """Such as one whose responses were all rejected, under train_on_everything."""
    rejected = torch.tensor([(*key, *length, False) for key, length in PARTS.items()])
    monkeypatch.setattr(schedule, "gather_rows", lambda own, group: rejected)
    found = distribute([replace(FIRST, has_gradient=False)], groups(world_size=2, tp=1, pp=1))
    assert found.num_samples[0] == 0
    assert len(found.samples) == 1  # it goes through the model all the same


def test_nothing_travels_where_groups_stay_whole(sent):
    for rank, own in enumerate(([FIRST, SECOND], [THIRD])):
        world = groups(rank=rank, world_size=2, tp=1, pp=1)
        assert distribute(own, world, keep_groups_whole=True).samples == own
    assert sent == []


def test_every_rank_of_a_replica_gets_a_sample(sent):
    distribute([SECOND], groups(world_size=4, tp=2, pp=1))
    assert sent == [((0, 7, 1), 2), ((0, 7, 1), 3)]
    sent.clear()
    found = distribute([SECOND], groups(rank=3, world_size=4, tp=2, pp=1))
    assert sent == [((0, 7, 1), 2)]
    assert found.samples[0] is SECOND


def test_replicas_train_five_and_seven_tokens():
    assert _replicas(PARTS, 2, Together()) == dict(zip(LENGTHS, (0, 1, 1), strict=True))
    assert balance([5, 4, 3], 2) == [[0], [1, 2]]


def test_rows_of_rank_one():
    assert rows_of([SECOND, THIRD], 8, count_multiple=1) == [[SECOND, THIRD]]
    assert rows_of([SECOND, THIRD], 8, count_multiple=2) == [[SECOND, THIRD], []]
    assert rows_of([], 8, count_multiple=2) == [[], []]
    assert fill_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_units_that_share_a_prompt_have_it_once_and_fit():
    """A prompt of 10 tokens, responses of 4, 6, 5 and 30; another group's of 2."""
    lengths = {(0, 1, i): Length(10, n) for i, n in enumerate((4, 6, 5, 30))}
    lengths[0, 2, 0] = Length(10, 2)
    together = Together(share_up_to=20)
    units = together.units(lengths)
    assert [unit.keys for unit in units] == [
        [(0, 1, 0), (0, 1, 1)],
        [(0, 1, 2)],
        [(0, 1, 3)],
        [(0, 2, 0)],
    ]
    assert [unit.tokens for unit in units] == [20, 15, 40, 12]
    assert len(Together().units(lengths)) == 5
    whole = Together(keep_groups_whole=True, share_up_to=20).units(lengths)
    assert [len(unit.keys) for unit in whole] == [4, 1]


def test_rows_of_units_stay_within_the_budget():
    samples = [
        replace(
            FIRST, group_id=g, index=i, prompt_tokens=torch.ones(10), response_tokens=torch.ones(n)
        )
        for g, group in enumerate(((4, 6, 5, 9), (2, 3)))
        for i, n in enumerate(group)
    ]
    rows = rows_of(samples, 35, count_multiple=1, share_prompts=True)
    assert [[(s.group_id, s.index) for s in row] for row in rows] == [
        [(0, 0), (0, 1), (0, 2), (0, 3)],
        [(1, 0), (1, 1)],
    ]
    assert len(rows_of(samples, 35, count_multiple=1)) == 3


def test_a_group_is_cut_so_that_replicas_can_be_given_alike():
    """Sixteen responses to one prompt, 4 replicas: no unit has more than a sixteenth of all."""
    lengths = {(0, 1, i): Length(10, 10) for i in range(16)}
    replica_of = _replicas(lengths, 4, Together(share_up_to=1000))
    assert sorted(Counter(replica_of.values()).values()) == [4, 4, 4, 4]
