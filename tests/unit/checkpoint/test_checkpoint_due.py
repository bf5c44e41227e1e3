"""When a checkpoint is written."""

import math

import pytest

from megatron_rl.checkpoint import due
from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.checkpoint.due import SaveTimes


@pytest.mark.parametrize(
    ("settings", "iteration", "values", "is_due"),
    [
        ({"save_every": 0, "keep_best": "a"}, 9, {"a": 1.0}, False),
        ({"save_every": 4}, 4, {}, True),
        ({"save_every": 4}, 5, {}, False),
        ({"save_every": 4}, 9, {}, True),  # the last
        ({"save_every": 4, "keep_best": "a"}, 5, {"a": 0.5}, False),  # no more than before
        ({"save_every": 4, "keep_best": "a"}, 5, {"a": 0.6}, True),
        ({"save_every": 4, "keep_best": "a"}, 5, {}, False),
    ],
)
def test_when_a_checkpoint_is_due(settings, iteration, values, is_due):
    saves = SaveTimes(config=CheckpointConfig(**settings), best=0.5)
    found = saves.is_due(
        iteration, is_last=iteration == 9, values=values, slowest=lambda _: pytest.fail("no clock")
    )
    assert found is is_due


def test_where_nothing_else_is_set_the_slowest_clock_decides(monkeypatch):
    saves = SaveTimes(config=CheckpointConfig(save_minutes=10), at=1000.0)
    monkeypatch.setattr(due.time, "monotonic", lambda: 1000.0 + 9 * 60)
    asked = []

    def due_where_another_rank_is_ahead_by(minutes):
        def slowest(own):
            asked.append(own)
            return own + minutes

        return saves.is_due(3, is_last=False, values={}, slowest=slowest)

    assert not due_where_another_rank_is_ahead_by(0.5)
    assert due_where_another_rank_is_ahead_by(1.0)
    assert asked == [9.0, 9.0]
    saves.saved(3)
    assert saves.at == 1000.0 + 9 * 60


def test_the_best_so_far_outlives_a_resume():
    saves = SaveTimes(config=CheckpointConfig(save_every=100, keep_best="a"))
    saves.resumed(7, None, [None, 0.25, 0.75])

    def is_due(value):
        return saves.is_due(8, is_last=False, values={"a": value}, slowest=max)

    assert not is_due(0.5)
    assert is_due(0.8)
    saves.saved(8)
    assert not is_due(0.8)
    saves.resumed(9, None, [None])
    assert saves.best == -math.inf
