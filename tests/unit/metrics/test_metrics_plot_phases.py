"""The chart of phases has the seconds that were written, stacked, with what ran beside them."""

import json

import pytest

from megatron_rl.commands.main import main
from megatron_rl.errors import InputError
from megatron_rl.metrics.plot import history
from megatron_rl.metrics.plot_phases import draw_phases, plot_phases

TURNS = (
    {"iteration": 0, "evaluation/aime24/average_at_8": 0.05},
    {"iteration": 1, "time/rollout_s": 2.0, "time/update_s": 3.0, "time/iteration_s": 5.5},
    {
        "iteration": 2,
        "time/rollout_s": 2.5,
        "time/logprob_s": 0.5,
        "time/update_s": 3.0,
        "time/iteration_s": 6.5,
    },
)
APART = (
    {
        "iteration": 1,
        "time/rollout_s": 0.1,
        "time/update_s": 3.0,
        "time/sampling_s": 2.0,
        "time/iteration_s": 3.5,
    },
)


def write_run(directory, records):
    directory.mkdir()
    path = directory / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def edges(axes, name):
    """(x, lower edge, upper edge) of what is filled."""
    (filled,) = (one for one in axes.collections if one.get_gid() == name)
    found = {}
    for x, y in filled.get_paths()[0].vertices.tolist():
        found.setdefault(x, set()).add(round(y, 9))
    return [(x, min(ys), max(ys)) for x, ys in sorted(found.items())]


def line(axes, name):
    return [list(map(list, one.get_data())) for one in axes.lines if one.get_gid() == name]


def test_phases_stand_on_each_other_and_sampling_beside_them(tmp_path):
    runs = [
        ("turns", [history(write_run(tmp_path / "turns", TURNS))]),
        ("apart", [history(write_run(tmp_path / "apart", APART))]),
    ]
    turns, apart = draw_phases(runs).axes
    assert edges(turns, "time/rollout_s") == [(1, 0, 2), (2, 0, 2.5)]
    assert edges(turns, "time/logprob_s") == [(1, 2, 2), (2, 2.5, 3)]  # the first one skipped it
    assert edges(turns, "time/update_s") == [(1, 2, 5), (2, 3, 6)]
    assert line(turns, "time/iteration_s") == [[[1, 2], [5.5, 6.5]]]
    assert line(turns, "time/sampling_s") == []
    assert edges(apart, "time/update_s") == [(1, 0.1, 3.1)]
    assert line(apart, "time/sampling_s") == [[[1], [2.0]]]  # inside of the update
    assert turns.get_ylim() == apart.get_ylim()


def test_the_command_writes_a_picture(tmp_path, capsys):
    path, output = write_run(tmp_path / "turns", TURNS), tmp_path / "phases.png"
    assert main(["plot", f"a={path}", f"a={path}", "--phases", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert capsys.readouterr().out == f"{output}\n"


def test_a_run_without_seconds_is_named(tmp_path):
    path = write_run(tmp_path / "turns", TURNS[:1])
    with pytest.raises(InputError, match=r"metrics\.jsonl: no time/iteration_s\. Give a"):
        plot_phases([("a", path)], tmp_path / "phases.png")
