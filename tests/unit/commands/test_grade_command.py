"""The command as people call it, in this process: files in, files out, lines on the terminal."""

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_rl import grade
from megatron_rl.commands.main import main
from megatron_rl.prompts.formats import read_records
from megatron_rl.prompts.layouts import CHATS, RowReader, recognise
from megatron_rl.prompts.rows import LeftOutError

LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"
EXPECTED = yaml.safe_load((LAYOUTS / "expected.yaml").read_text(encoding="utf-8"))

LINES = [
    {"response": "so \\boxed{4}", "answer": 4, "id": "a"},
    {"response": "so \\boxed{\\sqrt{12}}", "answer": "2\\sqrt{3}", "id": "b"},
    {"response": "so \\boxed{5", "answer": "4", "id": "c"},
    {"response": "\u7b54\u6848 \\boxed{5}", "answer": ["4"], "id": "d"},
]


@pytest.fixture
def run(tmp_path, capsys):
    """Grade lines with these arguments: exit code, graded lines or None, what was said."""

    def run_command(lines, *arguments):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        source.write_text("\n".join(texts) + "\n", encoding="utf-8")
        code = main(["grade", str(source), "--output", str(output), *arguments])
        said = capsys.readouterr()
        graded = None
        if output.exists():
            graded = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
        assert {path.name for path in tmp_path.iterdir()} <= {
            "in.jsonl",
            "out.jsonl",
            "recipe.yaml",
        }
        return code, graded, said.out + said.err

    return run_command


def test_lines_come_back_with_their_verdicts_in_order(run, monkeypatch):
    monkeypatch.setattr(grade, "_LINES_AT_A_TIME", 3)
    code, graded, said = run(LINES)
    assert code == 0
    assert [line["verdict"] for line in graded] == ["correct", "correct", "no_answer", "wrong"]
    assert [line["extracted"] for line in graded] == ["4", "\\sqrt{12}", None, "5"]
    assert [line["reward"] for line in graded] == [1.0, 1.0, -1.0, -1.0]
    assert all(0 <= line["seconds"] < 10 for line in graded)
    assert [{key: line[key] for key in LINES[0]} for line in graded] == LINES
    assert "4 responses graded" in said
    assert "correct           2   50.00%" in said
    assert "mean reward 0.0000" in said


@pytest.mark.parametrize("name", EXPECTED)
def test_responses_beside_rows_of_a_published_layout_are_graded(name, run, tmp_path):
    """Each row with a right and a wrong response, in the set's own columns."""
    records = [record for _, record in read_records(LAYOUTS / name)]
    rows = [row for row in records if is_used(name, row)]
    if isinstance(rows[0], list):
        rows = [{"0": first, "1": second} for first, second in rows]
    answers = EXPECTED[name]["answers"]
    assert len(rows) == len(answers)
    lines = [
        {**row, "response": f"\\boxed{{{text}}}"}
        for row, answer in zip(rows, answers, strict=True)
        for text in (answer, "12345")
    ]
    code, graded, said = run(lines)
    assert code == 0, said
    assert [line["verdict"] for line in graded] == ["correct", "wrong"] * len(answers)
    is_ours = EXPECTED[name]["layout"] == "prompt and answer"
    assert (f"layout: {EXPECTED[name]['layout']} (" in said) != is_ours


def is_used(name, row):
    """True for a row that no one leaves out."""
    reader = RowReader(layout=recognise([row], None, None) or CHATS, source=name)
    try:
        reader.read(1, row)
    except LeftOutError:
        return False
    return True


def test_a_row_without_an_answer_is_a_bad_line(run):
    code, graded, said = run(
        [{"problem": "1?", "solution": "It is so.", "response": "1", "level": "1"}]
    )
    assert (code, graded) == (2, None)
    assert "line 1: no final answer" in said


def test_fields_can_be_named(run):
    lines = [{"text": "\\boxed{4}", "gold": "4"}]
    code, graded, _ = run(lines, "--response-key", "text", "--answer-key", "gold")
    assert (code, graded[0]["verdict"]) == (0, "correct")


def test_a_reward_and_overrides_after_the_options(run):
    lines = [{"response": "it is 101", "answer": "100"}]
    settings = ("reward.tolerance=0.01", "reward.answer_in=response")
    code, graded, _ = run(lines, "--reward", "number", *settings)
    assert (code, graded[0]["verdict"], graded[0]["extracted"]) == (0, "correct", "101")


def test_answers_on_a_line_of_their_own(run):
    lines = [
        {"response": "so\n**Answer:** $34$.", "answer": "34"},
        {"response": "so \\boxed{34}", "answer": "34"},
    ]
    code, graded, _ = run(lines, "reward.answer_in=answer_line")
    assert code == 0
    assert [line["verdict"] for line in graded] == ["correct", "no_answer"]
    assert [line["extracted"] for line in graded] == ["$34$.", None]


def test_responses_that_start_inside_a_thought(run):
    lines = [
        {"response": "maybe \\boxed{3}", "answer": "3"},
        {"response": "maybe \\boxed{3}</think> no, \\boxed{4}", "answer": "4"},
    ]
    _, graded, _ = run(lines)
    assert [line["verdict"] for line in graded] == ["correct", "correct"]
    _, graded, _ = run(lines, "--opens-thought")
    assert [line["verdict"] for line in graded] == ["no_answer", "correct"]


def test_the_reward_of_the_documentation(run, tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text("utf-8")
    folder = tmp_path.with_name(tmp_path.name + "_rewards")
    folder.mkdir()
    (folder / "my_rewards.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(str(folder))
    lines = [
        {"response": "New York", "answer": "New York"},
        {"response": "It is New York", "answer": "New York"},
        {"response": "It is Rome", "answer": "New York"},
    ]
    code, graded, said = run(lines, "--reward", "my_rewards:shorter_is_better")
    assert code == 0, said
    assert [line["reward"] for line in graded] == [1.0, pytest.approx(1 / 3), -1.0]
    assert [line["verdict"] for line in graded] == ["correct", "wrong", "wrong"]


def test_the_reward_of_a_recipe(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run: {output_dir: runs/a, num_iterations: 1}\n"
        "model: {path: nowhere}\n"
        "prompts: {path: nowhere.jsonl}\n"
        "algorithm: {preset: grpo}\n"
        "reward:\n"
        "  correct: 2.0\n"
        "  parts:\n"
        "    length_penalty: {weight: 1.0, free_tokens: 100, max_tokens: 200}\n"
    )
    lines = [{"response": "\\boxed{4}", "answer": "4", "n": 150}]
    code, graded, said = run(lines, "--recipe", str(recipe))
    assert (code, graded) == (2, None)
    assert "--tokens-key" in said
    code, graded, _ = run(lines, "--recipe", str(recipe), "--tokens-key", "n")
    assert (code, graded[0]["reward"], graded[0]["reward_parts"]) == (
        0,
        1.5,
        {"length_penalty": -0.5},
    )


def test_every_bad_line_is_named_before_any_work(run, monkeypatch):
    monkeypatch.setattr(grade, "RewardScorer", None)  # nothing may be started
    lines = [
        LINES[0],
        '{"response": "cut off',
        "[1]",
        "",  # blank lines count, and are passed over
        {"response": "x"},
        {"response": None, "answer": "4"},
        {"response": "x", "answer": ""},
        {"response": "x", "answer": True},
    ]
    code, graded, said = run(lines)
    assert (code, graded) == (2, None)
    for message in (
        "6 unusable rows",
        "line 2: not JSON",
        "line 3: [1] is not a JSON object",
        "line 5: no field 'answer'; it has 'response'",
        "line 6: response=None: must be text",
        "line 7: answer='': must not be empty",
        "line 8: answer=True: must be text, a number",
    ):
        assert message in said


@pytest.mark.parametrize("tokens", [None, -1, 2.5, "7", True])
def test_a_bad_number_of_tokens_is_refused(run, tokens):
    lines = [{"response": "x", "answer": "4", "n": tokens}]
    code, graded, said = run(lines, "--tokens-key", "n")
    assert (code, graded) == (2, None)
    assert "must be a number of tokens" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reward.knd=math"], "Did you mean reward.kind?"),
        (["run.seed=1"], "override 'run.seed=1': only reward.key=value is read"),
        (["--reward", "maths"], "reward.kind='maths': must be math, exact"),
        (["--reward", "no_such_module:f"], "importing no_such_module raises ModuleNotFoundError"),
        (["--recipe", "nowhere.yaml"], "recipe 'nowhere.yaml' cannot be read"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused(run, arguments, message):
    code, graded, said = run(LINES, *arguments)
    assert (code, graded) == (2, None)
    assert message in said


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("nowhere.jsonl", "out.jsonl", "there is no such file"),
        ("in.jsonl", "in.jsonl", "it is the file to grade"),
        ("in.jsonl", ".", "it is a directory"),
        ("in.jsonl", "nowhere/out.jsonl", "its directory is not there"),
        ("empty.jsonl", "out.jsonl", "it has no line to grade"),
    ],
)
def test_files_that_cannot_be(tmp_path, monkeypatch, capsys, source, output, message):
    (tmp_path / "in.jsonl").write_text(json.dumps(LINES[0]))
    (tmp_path / "empty.jsonl").write_text("\n")
    monkeypatch.chdir(tmp_path)
    assert main(["grade", source, "--output", output]) == 2
    assert message in capsys.readouterr().err
    assert json.loads((tmp_path / "in.jsonl").read_text()) == LINES[0]


def test_a_run_that_breaks_leaves_the_old_output(run, tmp_path, monkeypatch):
    run(LINES)
    before = (tmp_path / "out.jsonl").read_text()
    monkeypatch.setattr(grade, "_LINES_AT_A_TIME", 2)
    monkeypatch.setattr(grade, "_graded", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(LINES)
    assert (tmp_path / "out.jsonl").read_text() == before


def test_failures_and_hopeless_answers_are_named(run):
    lines = [
        {"response": "\\boxed{\\sin(9^{9^{9}})}", "answer": "4"},
        {"response": "\\boxed{4}", "answer": "He has 2 + 2. #### 4"},
    ]
    code, graded, said = run(lines, "reward.deadline_s=1")
    assert code == 0
    assert [(line["verdict"], line["reward"]) for line in graded] == [
        ("timeout", None),
        ("wrong", -1.0),
    ]
    assert "line 1: timeout, " in said
    assert "line 2: 'He has 2 + 2. #### 4': it is a worked solution; use what stands" in said
