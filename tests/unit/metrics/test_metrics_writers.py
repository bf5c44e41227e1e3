import json
import sys

import pytest

from megatron_rl.errors import InputError
from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.metrics.writers import JsonlWriter, TensorBoardWriter, open_writers, read_jsonl


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


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"reward/mean": 1.0}', '"text"'])
def test_a_file_that_is_not_ours_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: .* is not a record of a run"):
        read_jsonl(path)


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
