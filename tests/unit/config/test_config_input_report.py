"""What a run says of its data before it starts, and `plan` without starting one."""

import json
import shlex

import pytest

from megatron_rl.commands.main import main
from megatron_rl.config import load_config
from megatron_rl.input_report import evaluation_lines, input_lines
from megatron_rl.preflight import read_data

ROWS = [{"prompt": f"{n}+{n}?", "answer": str(2 * n)} for n in range(1, 9)]


@pytest.fixture
def lines_of(case, tmp_path):
    """The lines on these rows, with changes to the recipe."""

    def lines(rows, name="data.jsonl", **changes):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = changes.pop("prompts", {})
        case.change(prompts={"path": str(path), **prompts}, **changes)
        config = load_config(case.write(), [])
        return input_lines(config, *read_data(config))

    return lines


def test_a_benchmark_is_told_like_the_prompts(lines_of, tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    rows = [{"problem": f"{n}-1?", "answer": "1"} for n in range(4)]
    for name in ("test", "train"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    evaluation = {"benchmarks": {"b": {"path": str(folder), "max_problems": 3}}}
    lines = lines_of(ROWS, evaluation=evaluation)
    (told,) = [n for n, line in enumerate(lines) if line.startswith("benchmark b: ")]
    assert lines[told] == (
        f"benchmark b: 3 of 4 rows, layout: problem and answer (problem, answer, final_answer, "
        f"expected_answer, ground_truth, label, solution), {folder / 'test.jsonl'}"
    )
    assert lines[told + 1].endswith("train.jsonl left out, of another split than test")


def test_an_evaluation_tells_of_its_benchmarks_alone(lines_of, case, tmp_path):
    path = tmp_path / "bench.jsonl"
    rows = [{"prompt": "2-1?", "answer": "1"}, ROWS[0], {"prompt": "x?", "answer": "{"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines_of(ROWS, evaluation={"benchmarks": {"b": {"path": str(path)}}}, reward={"kind": "math"})
    config = load_config(case.write(), [])
    first, overlap, gold, prompt, *_ = evaluation_lines(config, *read_data(config))
    assert first.startswith("benchmark b: 3 of 3 rows, layout: prompt and answer ")
    assert overlap.startswith("contamination: 1 of 3 questions of b ")
    assert gold.startswith("benchmark b: by 1 of 3 answers no response could be right")
    assert prompt == "first prompt, 4 tokens: '2-1?'"


def test_the_command_against_contamination_works_as_it_is_printed(lines_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bench mark.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    lines = lines_of(ROWS, evaluation={"benchmarks": {"b": {"path": str(path)}}})
    (told,) = [line for line in lines if line.startswith("contamination: 3 of 3 ")]
    program, *command = shlex.split(told.split("`")[1])
    assert (program, main(command)) == ("megatron-rl", 0)
    kept = (tmp_path / "prepared.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in kept] == [row["prompt"] for row in ROWS[3:]]


def test_overrides_that_lines_name_are_settings(case):
    """Of a full disk (weights/room.py), and of a system turn that the chat template writes."""
    config = load_config(
        case.write(),
        ["checkpoint.keep_last=1", "checkpoint.export_hf=false", "prompts.default_system=false"],
    )
    assert (config.checkpoint.keep_last, config.checkpoint.export_hf) == (1, False)
    assert config.prompts.default_system is False


def test_layout_counts_and_the_first_prompt_are_told(lines_of):
    lines = lines_of(ROWS)
    assert lines[0].startswith("layout: prompt and answer (prompt, answer), ")
    assert lines[1] == "prompts: 8 of 8 rows"
    assert lines[2].startswith("first prompt, 4 tokens: '1+1?'")


def test_what_is_left_out_is_counted_with_examples(lines_of):
    rows = [{"problem": row["prompt"], "answer": row["answer"]} for row in ROWS]
    spoiled = [{"problem": "3?", "answer": "proof"}, {"problem": "", "answer": "1"}]
    again = [{"problem": "1+1?", "answer": "3"}]
    lines = lines_of([*rows, *spoiled, *again], prompts={"max_unusable_frac": 0.1})
    assert "prompts: 9 of 11 rows" in lines
    assert "  1 left out: no final answer, such as data:9" in lines
    place = lines.index("  1 skipped, since they cannot be used:")
    assert lines[place + 1] == "    data:10: problem='': must not be empty"
    assert "  1 have the prompt of an earlier row and another answer" in lines


def test_a_form_that_the_first_prompt_does_not_ask_for_is_told(lines_of):
    told = "it does not say 'boxed', and reward.answer_in=box looks for the answer there"
    assert any(told in line for line in lines_of(ROWS))
    asks = {"template": "{prompt} \\boxed{{}}"}
    for changes in (
        {"prompts": asks},
        {"prompts": {"template": None}, "reward": {"kind": "number", "answer_in": "response"}},
    ):
        assert not any("does not say" in line for line in lines_of(ROWS, **changes))
    line = lines_of(ROWS, reward={"kind": "math", "answer_in": "answer_line"})[-1]
    assert "it does not say 'Answer:'" in line


def test_held_out_questions_that_are_trained_on_are_told(lines_of, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "9+9?", "answer": "18"}\n')
    lines = lines_of(ROWS, evaluation={"benchmarks": {"sums": {"path": str(held_out)}}})
    (line,) = (line for line in lines if line.startswith("contamination: "))
    assert "1 of 2 questions of sums are also trained on (0 to the letter, 1 but" in line


def test_plan_shows_the_prompt_and_refuses_what_a_start_refuses(case, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    case.change(prompts={"path": str(path)})
    assert main(["plan", str(case.write())]) == 0
    out = capsys.readouterr().out
    assert "inputs\n  layout: prompt and answer" in out
    assert "  first prompt, 4 tokens: '1+1?'" in out
    case.change(prompts={"answer_key": "gold"})
    assert main(["plan", str(case.write())]) == 2
    shown = capsys.readouterr()
    assert "memory per rank" in shown.out
    assert "prompts.answer_key='gold': no such column" in shown.err
    case.change(rollout={"max_response_tokens": 10**6})
    assert main(["plan", str(case.write())]) == 2
    assert "positions. Lower one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "asks"),
    [
        ({"kind": "math"}, True),
        ({"kind": "math", "answer_in": "answer_line"}, False),
        ({"kind": "exact"}, False),
    ],
)
def test_the_papers_texts_ask_for_a_box_where_one_is_looked_for(case, reward, asks):
    case.change(reward=reward)
    texts = load_config(case.write(), []).texts
    assert ("boxed" in texts.system, "boxed" in texts.instruction) == (asks, asks)


def test_answers_of_a_benchmark_that_nothing_matches_are_told(lines_of, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(
        '{"prompt": "9+8?", "answer": "17"}\n{"prompt": "9?", "answer": "\\\\frac{1"}\n'
    )
    lines = lines_of(ROWS, evaluation={"benchmarks": {"sums": {"path": str(held_out)}}})
    (line,) = (line for line in lines if line.startswith("benchmark sums: by "))
    assert "by 1 of 2 answers no response could be right, so these count as wrong: row 2: " in line
    assert "its braces are not balanced" in line
