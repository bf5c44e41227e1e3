import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.commands.plot import AXES
from megatron_rl.metrics.plot import COLORS, X_LABELS, band, draw, history, plot_run

ROOT = Path(__file__).parents[3]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_run(directory, records):
    directory.mkdir()
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


def points(axes, name):
    return [list(map(list, line.get_data())) for line in axes.lines if line.get_gid() == name]


@pytest.fixture
def grpo(tmp_path):
    return write_run(
        tmp_path / "grpo",
        [
            {"iteration": 0, "evaluation/aime24/average_at_8": 0.05},
            {"iteration": 1, "reward/mean": 0.1, "reward/accuracy": 0.2, "policy/kl_initial_k1": 0},
            {"iteration": 2, "reward/mean": 0.9, "policy/kl_initial_k1": None},
            {"iteration": 2, "reward/mean": 0.3, "policy/kl_initial_k1": None},
            {"iteration": 4, "reward/mean": 0.5, "evaluation/aime24/average_at_8": 0.25},
        ],
    )


def test_history_skips_gaps_and_takes_the_last_record_of_an_iteration(grpo):
    curves = history(grpo)
    assert curves["reward/mean"] == ([1, 2, 4], [0.1, 0.3, 0.5])
    assert curves["policy/kl_initial_k1"] == ([1], [0])
    assert "iteration" not in curves


def test_axes_hold_the_numbers(grpo):
    figure = draw([("grpo", [history(grpo)])])
    assert points(panel(figure, "Reward"), "reward/mean") == [[[1, 2, 4], [0.1, 0.3, 0.5]]]
    accuracy = panel(figure, "Accuracy")
    assert points(accuracy, "reward/accuracy") == [[[1], [0.2]]]
    assert points(accuracy, "evaluation/aime24/average_at_8") == [[[0, 4], [0.05, 0.25]]]
    assert points(panel(figure, "KL to the initial policy"), "policy/kl_initial_k1") == [[[1], [0]]]


def test_a_panel_without_numbers_says_so(grpo):
    figure = draw([("grpo", [history(grpo)])])
    said = [text.get_text() for text in panel(figure, "Response length").texts]
    assert said == ["not measured"]


def test_entropy_over_everything_sampled_wins_over_that_of_what_was_trained_on():
    both = {"policy/entropy_mean": ([1, 2], [0.5, 0.4]), "rollout/entropy_estimate": ([1], [9.0])}
    trained = {"policy/entropy_mean": ([1, 2], [0.7, 0.6])}
    axes = panel(draw([("a", [both]), ("b", [trained])]), "Entropy")
    assert points(axes, "policy/entropy_mean") == [[[1, 2], [0.7, 0.6]]]
    assert points(axes, "rollout/entropy_estimate") == [[[1], [9.0]]]


def test_runs_of_one_label_are_a_mean_in_a_band():
    seeds = [
        {"reward/mean": ([1, 2, 3], [0.0, 0.5, 1.0])},
        {"reward/mean": ([1, 2], [0.5, 1.0])},  # still running
    ]
    axes = panel(draw([("grpo", seeds)]), "Reward")
    assert points(axes, "reward/mean") == [[[1, 2], [0.25, 0.75]]]
    (shade,) = axes.collections
    corners = {tuple(point) for point in shade.get_paths()[0].vertices.tolist()}
    assert {(1.0, 0.0), (1.0, 0.5), (2.0, 0.5), (2.0, 1.0)} <= corners


def test_against_tokens_the_curve_stands_where_the_training_had_come():
    runs = [
        {"reward/mean": ([1, 2], [0.1, 0.3]), "policy/trained_tokens": ([1, 2], [100.0, 50.0])},
        {"reward/mean": ([1, 2], [0.2, 0.4]), "policy/trained_tokens": ([2], [30.0])},
    ]
    x, mean, least, largest = band(runs, "reward/mean", "tokens")
    assert x == [50.0, 90.0]  # means of 100 and 0, of 150 and 30
    assert mean == pytest.approx([0.15, 0.35])
    assert (least, largest) == ([0.1, 0.3], [0.2, 0.4])


def test_against_seconds_evaluations_are_left_out():
    run = {
        "reward/mean": ([1, 2], [0.1, 0.3]),
        "time/rollout_s": ([1, 2], [2.0, 3.0]),
        "time/update_s": ([1, 2], [0.5, 0.25]),
        "time/evaluation_s": ([2], [40.0]),
        "time/iteration_s": ([1, 2], [3.0, 44.0]),
        "rollout/tokens": ([1, 2], [10.0, 20.0]),
    }
    assert band([run], "reward/mean", "seconds")[0] == [2.5, 5.75]
    assert band([run], "reward/mean", "drawn")[0] == [10.0, 30.0]
    assert set(AXES) == set(X_LABELS)


def test_runs_differ_by_colour_and_one_legend_names_them_all(grpo):
    reinforce = {"reward/mean": ([1, 2], [0.0, 1.0])}
    figure = draw([("grpo", [history(grpo)]), ("reinforce", [reinforce])])
    assert [line.get_color() for line in panel(figure, "Reward").lines] == list(COLORS[:2])
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["grpo", "reinforce", "held-out aime24 average@8"]
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_more_runs_than_colours_stay_apart():
    runs = [(str(run), [{"reward/mean": ([1, 2, 3], [0, run, 0])}]) for run in range(9)]
    lines = panel(draw(runs), "Reward").lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_plot_run_writes_a_png(grpo, tmp_path):
    output = tmp_path / "plots" / "runs.png"
    plot_run([("grpo", grpo)], output)
    assert output.read_bytes().startswith(PNG_SIGNATURE)


def run_command(*arguments):
    command = [sys.executable, "tools/plot_runs.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_command_takes_directories_files_and_labels(grpo, tmp_path):
    done = run_command(grpo.parent, f"again={grpo}", "--output", tmp_path / "runs.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs.png").read_bytes().startswith(PNG_SIGNATURE)


def test_the_command_names_a_run_that_is_not_there(tmp_path):
    failed = run_command(tmp_path, "--output", tmp_path / "runs.png")
    assert failed.returncode == 2
    assert f"no file {tmp_path}/metrics.jsonl" in failed.stderr
