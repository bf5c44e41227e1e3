import json

import pytest

from megatron_rl.evaluation.config import BenchmarkConfig, EvaluationConfig
from megatron_rl.evaluation.measures import BenchmarkResult, Measured
from megatron_rl.evaluation.question import Question
from megatron_rl.evaluation.report import Evaluation, unanswered, untrained, write_questions
from megatron_rl.types import Verdict


def result(value, no_answer=0.125, num_cut_short=0):
    """On 7 questions with 2 responses each, 14 in all."""
    measured = {
        "average_at_2": Measured(value, value - 0.1, value + 0.1),
        "pass_at_2": Measured(value + 0.1, value, value + 0.2),
        "truncated_frac": Measured(0.25, 0.0, 0.5),
        "wrong_frac": Measured(0.375, 0.0, 1.0),
        "no_answer_frac": Measured(no_answer, 0.0, 1.0),
        "timeout_frac": Measured(0.0625, 0.0, 1.0),
        "error_frac": Measured(0.03125, 0.0, 1.0),
        "response_tokens_mean": Measured(12.4, 10.0, 15.0),
    }
    verdicts = {"correct": 4, "wrong": 3, "no_answer": 4, "timeout": 2, "error": 1}
    return BenchmarkResult(
        num_questions=7,
        verdicts={Verdict(name): count for name, count in verdicts.items()},
        num_cut_short=num_cut_short,
        measured=measured,
        means=None,
    )


def evaluation(**overall):
    return Evaluation(
        samples=2, confidence=0.9, benchmarks={"math500": result(0.4)}, overall=overall
    )


def test_table_and_metrics_say_the_same():
    header, row, note = evaluation().table()
    assert header.split() == [
        "benchmark", "problems", "average@2", "pass@2", "maj@2", "wrong", "no", "answer",
        "truncated", "timeouts", "errors", "tokens",
    ]  # fmt: skip
    assert row.split() == [
        "math500", "7", "40.0", "[30.0,", "50.0]", "50.0", "[40.0,", "60.0]", "-",
        "37.5", "12.5", "25.0", "2", "1", "12",
    ]  # fmt: skip
    assert [header.index(title) + len(title) for title in ("wrong", "no answer", "errors")] == [
        row.rindex(value) + len(value) for value in (" 37.5", " 12.5", "   1")
    ]
    assert "90% intervals" in note
    assert evaluation().metrics() == {
        "evaluation/math500/average_at_2": 0.4,
        "evaluation/math500/pass_at_2": 0.5,
        "evaluation/math500/truncated_frac": 0.25,
        "evaluation/math500/wrong_frac": 0.375,
        "evaluation/math500/no_answer_frac": 0.125,
        "evaluation/math500/timeout_frac": 0.0625,
        "evaluation/math500/error_frac": 0.03125,
        "evaluation/math500/response_tokens_mean": 12.4,
    }


def test_a_model_that_gives_no_answers_is_not_said_to_be_wrong():
    benchmarks = {"gsm8k": result(0.0, no_answer=1.0), "math500": result(0.0, no_answer=0.4)}
    *_, last = Evaluation(samples=2, confidence=0.9, benchmarks=benchmarks, overall={}).table()
    assert last.startswith("gsm8k: 100% of the responses hold no answer to grade. The model may")


@pytest.mark.parametrize(("num_cut_short", "is_blamed"), [(1, False), (2, True), (4, True)])
def test_responses_that_were_cut_before_an_answer_are_told_apart(num_cut_short, is_blamed):
    """Of four responses without an answer, two are half."""
    benchmarks = {"aime24": result(0.0, no_answer=0.5, num_cut_short=num_cut_short)}
    found = Evaluation(samples=2, confidence=0.9, benchmarks=benchmarks, overall={})
    (line,) = found.warnings()
    assert ("cut at the limit. Raise evaluation.max_response_tokens" in line) is is_blamed
    assert ("reward.answer_in" in line) is not is_blamed
    assert found.table()[-1] == line


def test_the_file_counts_responses_by_verdict():
    written = evaluation().to_json()["benchmarks"]["math500"]
    assert written["verdicts"] == {
        "correct": 4, "wrong": 3, "no_answer": 4, "timeout": 2, "error": 1
    }  # fmt: skip
    assert written["num_failed"] == 3


@pytest.mark.parametrize(("iteration", "share", "lines"), [(1, 0.97, 1), (1, 0.9, 0), (2, 1.0, 0)])
def test_a_run_whose_responses_hold_no_answer_says_so_once(iteration, share, lines):
    said = unanswered({"reward/verdict_no_answer_frac": share}, iteration)
    assert [line[:42] for line in said] == ["97% of the responses hold no answer to gra"] * lines


def test_the_average_has_a_row_of_its_own():
    average = evaluation(**result(0.2).measured)
    assert average.table()[2].split()[:3] == ["overall", "20.0", "[10.0,"]
    assert average.table()[2].split()[-4:] == ["37.5", "12.5", "25.0", "12"]
    assert average.metrics()["evaluation/overall/average_at_2"] == 0.2
    assert average.to_json()["overall"]["average_at_2"] == {
        "value": 0.2,
        "low": 0.1,
        "high": pytest.approx(0.3),
    }


def test_written_questions_are_readable_and_survive_any_text(tmp_path):
    question = Question(
        number=3,
        prompt="求 ½ 的值",
        answer="1",
        responses=("线 \u2028 line\nend", "half \ud800 pair"),
        verdicts=("correct", "no_answer"),
        extracted=("1", None),
        tokens=(5, 6),
        truncated=(False, True),
        majority=1.0,
    )
    file = tmp_path / "new" / "b.jsonl"
    write_questions([question], file)
    text = file.read_text(encoding="utf-8")
    assert "求 ½ 的值" in text
    (row,) = [json.loads(line) for line in text.splitlines()]
    assert row["responses"] == ["线 \u2028 line\nend", "half \ud800 pair"]
    assert row["num_correct"] == 1
    assert row["extracted"] == ["1", None]
    assert list(row)[-1] == "responses"
    assert [path.name for path in file.parent.iterdir()] == ["b.jsonl"]


@pytest.mark.parametrize("name", ["overall", "a/b", "", "../x", ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="must be made of letters"):
        EvaluationConfig(benchmarks={name: BenchmarkConfig(path="x.jsonl")})


def test_a_run_that_trained_nothing_counts_its_verdicts_and_names_a_way_out():
    told = untrained({Verdict.WRONG: 28, Verdict.NO_ANSWER: 740, Verdict.CORRECT: 0})
    assert told.startswith("no optimizer step was taken in any iteration")
    assert "Of 768 responses 740 held no answer to grade, 28 were wrong. The model may not" in told
    assert "prompts.instruction" in told
    assert untrained({Verdict.CORRECT: 9, Verdict.WRONG: 3}).endswith(
        "Of 12 responses 9 were correct, 3 were wrong. Use harder prompts"
    )
    assert "rollout.group_size" in untrained({Verdict.WRONG: 3})


def test_every_verdict_has_its_words_where_nothing_was_trained():
    for verdict in Verdict:
        assert "Of 2 responses 2 " in untrained({verdict: 2})


def test_where_nothing_was_drawn_nothing_is_counted():
    assert untrained({}).endswith("so the model is the one it began with")
