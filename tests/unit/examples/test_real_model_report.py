"""The report of examples/real_model says what records and evaluations say, worked out by hand."""

import importlib.util
import json
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[3] / "examples" / "real_model" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("real_model_report", REPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share(value, low, high):
    return {"value": value, "low": low, "high": high}


def write_summary(path, benchmark, accuracy, *, iteration, tokens, truncated):
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = {
        "num_problems": 50,
        "average_at_1": accuracy,
        "truncated_frac": truncated,
        "response_tokens_mean": share(tokens, tokens, tokens),
    }
    path.write_text(json.dumps({"iteration": iteration, "benchmarks": {benchmark: measured}}))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(run, *, after):
    """Six iterations of 10, 20, ... 60 s, the last with an evaluation of 6 s and a save of 12 s."""
    records = [{"iteration": 0, "time/evaluation_s": 30.0, "memory/peak_gib": 3.0}]
    for number in range(1, 7):
        records.append(
            {
                "iteration": number,
                "time/iteration_s": 10.0 * number,
                "time/rollout_s": 4.0 * number,
                "time/update_s": 5.0 * number,
                "memory/peak_gib": 4.25,
                "reward/accuracy": 0.1 * number,
                "reward/groups_mixed_frac": 0.5,
                "rollout/entropy_estimate": 0.25,
                "rollout/response_tokens_mean": 20.0,
                "policy/trained_tokens": 1000.0,
            }
        )
    records[-1] |= {"time/iteration_s": 78.0, "time/evaluation_s": 6.0, "time/checkpoint_s": 12.0}
    folder = run / "evaluation"
    for iteration, accuracy, tokens in ((0, share(0.2, 0.125, 0.25), 30), (6, after, 10)):
        write_summary(
            folder / f"summary_{iteration:06d}.json",
            "words",
            accuracy,
            iteration=iteration,
            tokens=tokens,
            truncated=share(0.01 * tokens, 0, 1),
        )
    for iteration, right in ((0, (0, 1, 0)), (6, (1, 1, 0))):
        rows = [{"prompt": f"p{i}", "num_correct": count} for i, count in enumerate(right)]
        write_lines(folder / f"words_{iteration:06d}.jsonl", rows)
    write_lines(run / "metrics.jsonl", records)


def test_the_report(report, tmp_path):
    write_run(tmp_path / "grpo", after=share(0.5, 0.375, 0.625))
    write_run(tmp_path / "reinforce_rej", after=share(0.3, 0.25, 0.35))
    write_summary(
        tmp_path / "gsm8k" / "start" / "evaluation" / "summary.json",
        "gsm8k_short",
        share(0.02, 0, 0.06),
        iteration=None,
        tokens=120,
        truncated=share(0.1, 0, 0.2),
    )
    expressions = ("3+4", "5+5", "9-2")
    write_lines(
        tmp_path / "data" / "heldout.jsonl",
        [{"prompt": f"p{i}", "expression": e} for i, e in enumerate(expressions)],
    )
    assert report.main([str(tmp_path)]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    for line in (
        "| held-out accuracy, % | at the start | after 6 | tokens a response | cut, % |",
        "| grpo | 20.0 [12.5, 25.0] | 50.0 [37.5, 62.5] | 30 to 10 | 30 to 10 |",
        # 37.5 is above 25; an interval that begins where the first one ends is not
        "- grpo: the last interval lies above the first: 20.0 [12.5, 25.0] before, "
        "50.0 [37.5, 62.5] after",
        "- reinforce_rej: the last interval does NOT lie above the first: 20.0 [12.5, 25.0] "
        "before, 30.0 [25.0, 35.0] after",
        "| grpo | 1 of 2, 2 of 2 | 0 of 1, 0 of 1 |",
        "| start | 50 | 2.0 [0.0, 6.0] | 10.0 [0.0, 20.0] | 120 |",
        "| grpo, iterations | 1-5 | 6-6 |",
        "| accuracy of the rollouts, % | 30.0 | 60.0 |",  # (10 + 20 + 30 + 40 + 50) / 5
    ):
        assert line in lines
    # medians of 4, 8, ... 24 and so on; 10 + ... + 60 s are 3.5 minutes, 30 + 6 s are 0.6
    assert (
        "| grpo | 14.0 | 0.0 | 0.0 | 17.5 | 0.0 | 35.0 | 3.5 | 0.6 | 0.2 | 4.2 | 6,000 |" in lines
    )
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_no_run_is_said(report, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "no run" in capsys.readouterr().out
