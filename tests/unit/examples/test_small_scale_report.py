"""The report's numbers are what the records say, worked out by hand."""

import importlib.util
import json
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[3] / "examples" / "small_scale" / "report.py"
ACCURACY = "evaluation/arithmetic/average_at_16"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", REPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(output, method, seed, *, end, kl, tokens, finished=True):
    """Forty iterations; entropy 0.5 until the last ten, then 0.1."""
    run = output / method / f"seed{seed}"
    run.mkdir(parents=True)
    records = [{"iteration": 0, ACCURACY: 0.4}]
    for iteration in range(1, 41):
        records.append(
            {
                "iteration": iteration,
                "policy/kl_initial_k1": kl,
                "policy/entropy_sampled": 0.5 if iteration <= 30 else 0.1,
                "algorithms/kept_responses_frac": 0.25,
                "policy/trained_tokens": tokens,
                "rollout/tokens": 200.0,
                "time/rollout_s": 0.25,
                "time/update_s": 0.25,
                "time/iteration_s": 9.0,
            }
        )
    records[20][ACCURACY], records[40][ACCURACY] = 0.6, end
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if finished:
        (run / "finished").touch()


def test_table_and_costs(report, tmp_path, capsys):
    write_run(tmp_path, "grpo", 0, end=0.8, kl=0.02, tokens=100)
    write_run(tmp_path, "grpo", 1, end=0.9, kl=0.05, tokens=100)
    write_run(tmp_path, "raft", 0, end=0.7, kl=0.1, tokens=25)
    write_run(tmp_path, "raft", 1, end=0.1, kl=0.1, tokens=25, finished=False)
    assert report.main([str(tmp_path)]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    # 0.4 to 0.8 at 0.02 nats and 0.4 to 0.9 at 0.05 nats: 2000 and 1000 points a nat
    assert "| grpo | 2 | 60.0 [60.0, 60.0] | 85.0 [80.0, 90.0] | 0.0350 [0.0200, 0.0500] |" in str(
        lines
    )
    assert "1500 [1000, 2000] | 0.1000 [0.1000, 0.1000] | 0.5000 [0.5000, 0.5000]" in str(lines)
    assert "| raft | 1 | 60.0 | 70.0 | 0.1000 | 300 | 0.1000 | 0.5000 | 0.25 |" in lines
    assert "| raft | 1000 | 0.12 |" in lines
    assert "| grpo | 4000 [4000, 4000] | 0.50 [0.50, 0.50] |" in lines
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    assert (tmp_path / "methods_by_tokens.png").exists()


def test_accuracy_at_equal_cost_is_interpolated(report, tmp_path):
    """8,000 tokens and 20 seconds, of which 4,000 and 10 at iteration 20: 0.4, 0.6, 0.8."""
    write_run(tmp_path, "dapo", 0, end=0.8, kl=0.02, tokens=100)
    run = report.history(tmp_path / "dapo" / "seed0" / "metrics.jsonl")
    for budget, expected in ((0, 0.4), (2000, 0.5), (4000, 0.6), (6000, 0.7), (9000, 0.8)):
        assert report.accuracy_after(run, budget, "drawn") == pytest.approx(expected)
    assert report.accuracy_after(run, 15, "seconds") == pytest.approx(0.7)
    lines = report.at_equal_cost({"dapo": [run]})
    assert "| dapo | 8000 | 20 | 4000 tokens | 60.0 |" in lines
    assert "| dapo | 8000 | 20 | 20 s | 80.0 |" in lines


def test_nothing_finished_is_said(report, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "no finished run" in capsys.readouterr().out
