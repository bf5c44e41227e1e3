"""Which checkpoints stay on disk after a save."""

import json
import os

import pytest
from test_checkpoint_manifest import make

from megatron_rl.checkpoint import retention
from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.checkpoint.manifest import write_manifest
from megatron_rl.checkpoint.names import iteration_of, name_of


@pytest.fixture
def retired(tmp_path):
    """What is left after a save, in a process that verified and rejected some at its start."""

    def work(saved, *, verified=(), rejected=(), **settings):
        names = [{name_of(n) for n in numbers} for numbers in ((saved, *verified), rejected)]
        retention.retire(
            tmp_path,
            name_of(saved),
            CheckpointConfig(**settings),
            verified=names[0],
            rejected=names[1],
        )
        return sorted(iteration_of(path) for path in tmp_path.iterdir())

    return work


def test_the_newest_stay(tmp_path, retired):
    for iteration in (1, 2, 3, 4):
        make(tmp_path, iteration)
    assert retired(4, keep_last=2) == [3, 4]


@pytest.mark.parametrize("damage", ["empty", "flipped"])
def test_damaged_newer_ones_do_not_push_a_good_one_out(tmp_path, retired, damage):
    """The directories 8 and 9 were rejected at the start, which went on from 4."""
    for iteration in (3, 4, 5):
        make(tmp_path, iteration)
    for iteration in (8, 9):
        path = make(tmp_path, iteration)
        if damage == "flipped":
            (path / "rank_0.pt").write_bytes(b"RANDOM")
        else:
            for file in sorted(path.rglob("*"), reverse=True):
                os.unlink(file) if file.is_file() else os.rmdir(file)
    assert retired(5, verified=(4,), rejected=(8, 9), keep_last=1) == [5, 8, 9]


def test_what_was_just_written_stays_below_higher_numbers_too(tmp_path, retired):
    """Somebody put 8 and 9 there while the run went on; nobody has read them."""
    for iteration in (4, 5, 8, 9):
        make(tmp_path, iteration)
    assert retired(5, verified=(4,), keep_last=1) == [5, 9]


def test_incomplete_older_ones_do_not_count(tmp_path, retired):
    for iteration in (1, 2, 3, 4):
        make(tmp_path, iteration)
    (tmp_path / "iteration_000003" / "rank_0.pt").unlink()
    assert retired(4, keep_last=2) == [2, 3, 4]  # 3 is no checkpoint, so 2 is the second one


def test_keep_every_keeps_older_ones(tmp_path, retired):
    for iteration in range(1, 10):
        make(tmp_path, iteration)
    assert retired(9, keep_last=1, keep_every=3) == [3, 6, 9]


def score(path, value):
    (path / "state.json").write_text(json.dumps({"score": value}))
    files = dict.fromkeys(("policy/.metadata", "rank_0.pt"), (0, ""))
    for name in files:
        (path / name).write_bytes(b"")
    files["state.json"] = ((path / "state.json").stat().st_size, "")
    write_manifest(path, iteration_of(path), 1, files)


def test_the_best_stays(tmp_path, retired):
    for iteration, value in ((1, 0.25), (2, 0.75), (3, 0.5), (4, None), (5, 0.5)):
        score(make(tmp_path, iteration), value)
    assert retired(5, keep_last=1, keep_best="evaluation/x/average_at_4") == [2, 5]


def test_a_score_that_is_no_number_is_none(tmp_path):
    path = make(tmp_path, 1)
    for text in ("[]", "{", '{"score": "high"}', "{}"):
        (path / "state.json").write_text(text)
        assert retention.score_of(path) is None
