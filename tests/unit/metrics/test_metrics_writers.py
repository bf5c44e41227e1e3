import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.errors import InputError, RunError
from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.metrics.writers import (
    JsonlWriter,
    TensorBoardWriter,
    appended_files,
    check_appendable,
    open_writers,
    prepare_to_append,
    read_jsonl,
)


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"reward/mean": 0.5, "policy/updates": 2})
    text = (tmp_path / "metrics.jsonl").read_text()  # the writer is still open
    assert text == '{"iteration": 1, "reward/mean": 0.5, "policy/updates": 2}\n'


def test_numbers_that_json_lacks_become_null(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"policy/grad_norm": float("inf"), "policy/loss": float("nan")})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"iteration": 1, "policy/grad_norm": None, "policy/loss": None}
    ]


def test_a_resumed_run_does_not_repeat_iterations(tmp_path):
    first = JsonlWriter(tmp_path / "metrics.jsonl")
    for iteration in (1, 2, 3, 4):
        first.write(iteration, {"reward/mean": iteration / 10})
    first.close()

    resumed = JsonlWriter(tmp_path / "metrics.jsonl")  # from a checkpoint of iteration 2
    resumed.truncate_after(2)
    resumed.write(3, {"reward/mean": 0.33})
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(r["iteration"], r["reward/mean"]) for r in records] == [(1, 0.1), (2, 0.2), (3, 0.33)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_by_a_crash_is_dropped_and_not_written_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1, "reward/mean": 0.1}\n{"iteration": 2, "rew')
    resumed = JsonlWriter(path)
    resumed.truncate_after(5)
    resumed.write(2, {"reward/mean": 0.2})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("lost_at", ["open", "read", "replace"])
def test_a_directory_that_is_removed_is_named_whenever_that_happens(tmp_path, monkeypatch, lost_at):
    writer = JsonlWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write(1, {"reward/mean": 0.1})
    if lost_at == "read":
        shutil.rmtree(tmp_path / "run")
    else:
        sync = os.fsync
        replace = Path.replace

        def remove() -> None:
            shutil.rmtree(tmp_path / "run")

        if lost_at == "replace":
            monkeypatch.setattr(os, "fsync", lambda file: (sync(file), remove()))
        else:
            monkeypatch.setattr(Path, "replace", lambda *paths: (replace(*paths), remove()))
    with pytest.raises(RunError, match=r"run: it is gone: .* wrote metrics\.jsonl\. Bring it back"):
        writer.truncate_after(1)


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"reward/mean": 1.0}', '"text"'])
def test_a_file_that_is_not_ours_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: .* is not a record of a run"):
        read_jsonl(path)


GOOD = b'{"iteration": 1}\n{"iteration": 2}\n'
DAMAGED_ENDS = {
    "cut off": b'{"iteration": 3, "rew',
    "cut off at its end": b'{"iteration": 3}',
    "text": b"No space left\n",
    "another object": b'{"reward/mean": 1.0}\n',
    "not finite": b'{"iteration": Infinity}\n',
    "zeros": bytes(64),
    "not UTF-8": b'{"iteration": 3, "\xff": 1}\n',
    "two lines": b'{"iteration"\n{"iteration": 4',
}


@pytest.mark.parametrize("end", DAMAGED_ENDS)
def test_a_damaged_end_is_cut_and_said(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + DAMAGED_ENDS[end])
    check_appendable(path, done=2)
    assert path.read_bytes() == GOOD + DAMAGED_ENDS[end]  # only the main rank may cut it
    assert list(prepare_to_append(path, done=2)) == [
        f"metrics.jsonl: its last {len(DAMAGED_ENDS[end])} bytes were damaged and are cut off; the "
        "last iteration in it is 2"
    ]
    assert path.read_bytes() == GOOD
    assert list(prepare_to_append(path, done=2)) == []


@pytest.mark.parametrize("line", sorted(DAMAGED_ENDS.keys() - {"cut off at its end"}))
def test_damage_before_good_records_is_an_error_with_the_command_that_mends_it(tmp_path, line):
    path = tmp_path / "a run's metrics.jsonl"
    path.write_bytes(GOOD + DAMAGED_ENDS[line].rstrip(b"\n") + b"\n" + GOOD)
    with pytest.raises(InputError, match=r"line 3: .* is not a record of a run, and good") as told:
        check_appendable(path, done=2)
    command = str(told.value).partition("Remove the line: ")[2]
    for _ in range(2 if line == "two lines" else 1):
        subprocess.run(command, shell=True, check=True)
    assert path.read_bytes() == GOOD + GOOD


def test_a_new_run_keeps_whatever_is_there_under_another_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(prepare_to_append(path, done=0)) == []
    for number in (0, 1):
        path.write_bytes(b"text\n" + GOOD)
        check_appendable(path, done=0)
        assert list(prepare_to_append(path, done=0)) == [
            "metrics.jsonl of an earlier run, which has no checkpoint, is kept as "
            f"metrics.jsonl.{number}"
        ]
        assert (tmp_path / f"metrics.jsonl.{number}").read_bytes() == b"text\n" + GOOD
        open_writers(MetricsConfig(), tmp_path)[0].close()
        assert path.read_bytes() == b""


def test_where_it_is_not_known_what_is_done_nothing_is_touched(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + b"text\n")
    check_appendable(path, done=None)
    assert list(prepare_to_append(path, done=None)) == []
    assert path.read_bytes() == GOOD + b"text\n"


def test_a_file_that_is_gone_is_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    check_appendable(path, done=4)
    (line,) = prepare_to_append(path, done=4)
    assert line == "metrics.jsonl is not there: it will hold nothing of iterations 1 to 4"


@pytest.mark.parametrize("done", [0, 4])
def test_a_directory_in_its_place_is_refused(tmp_path, done):
    with pytest.raises(InputError, match=r"it must be a file, and is none\. Move it away"):
        check_appendable(tmp_path, done)


def test_only_files_that_the_recipe_asks_for_are_looked_at(tmp_path):
    both = appended_files(MetricsConfig(rollouts_every=2), tmp_path)
    assert [path.name for path in both] == ["metrics.jsonl", "rollouts.jsonl"]
    assert appended_files(MetricsConfig(jsonl=False), tmp_path) == []


def test_tensorboard_events_hold_the_numbers_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardWriter(tmp_path, first_iteration=1)
    for iteration, value in ((1, 0.5), (2, 0.25), (3, 0.125)):
        first.write(iteration, {"reward/mean": value})
    first.close()
    resumed = TensorBoardWriter(tmp_path, first_iteration=3)
    resumed.write(3, {"reward/mean": 0.75})
    resumed.close()

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert scalars == [(1, 0.5), (2, 0.25), (3, 0.75)]


def test_open_writers_opens_what_the_config_names(tmp_path):
    assert open_writers(MetricsConfig(jsonl=False), tmp_path) == []
    jsonl, tensorboard = open_writers(MetricsConfig(tensorboard=True), tmp_path)
    for writer in (jsonl, tensorboard):
        writer.write(1, {"reward/mean": 1.0})
        writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_open_writers_of_a_resume_keep_what_was_done(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n')
    open_writers(MetricsConfig(), tmp_path, last_iteration=1)[0].close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"iteration": 1}]


def test_wandb_offline_writes_files_and_keeps_the_id_of_a_resumed_run(tmp_path):
    pytest.importorskip("wandb")
    config = MetricsConfig(jsonl=False, wandb_project="test")
    for last_iteration in (None, 1):
        (writer,) = open_writers(
            config, tmp_path, last_iteration=last_iteration, run_settings={"seed": 7}
        )
        writer.write(1 if last_iteration is None else 2, {"reward/mean": 0.5})
        writer.close()
    run_id = (tmp_path / "wandb_run_id").read_text()
    records = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in records} == {f"run-{run_id}.wandb"}
    assert all(path.stat().st_size > 0 for path in records)


def test_a_missing_package_is_named_with_the_field_that_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` raise ImportError
    expected = r"metrics\.wandb_project='x': needs the package wandb, which is not installed"
    with pytest.raises(InputError, match=expected):
        open_writers(MetricsConfig(jsonl=False, wandb_project="x"), tmp_path)


def test_online_without_a_project_is_refused():
    with pytest.raises(ValueError, match=r"metrics\.wandb_mode='online': has no effect"):
        MetricsConfig(wandb_mode="online")
