"""Data as they are published: the layouts beside tests/data/layouts, formats, folders, chats."""

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml
from char_tokenizer import CharTokenizer, ChatCharTokenizer

from megatron_rl.commands.prompt_files import Preparation, prepare
from megatron_rl.errors import InputError
from megatron_rl.prompts import formats
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.folder import split_of
from megatron_rl.prompts.source import read_rows
from megatron_rl.prompts.template import FOR_MATHEMATICS, NO_TEXTS

LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"
EXPECTED = yaml.safe_load((LAYOUTS / "expected.yaml").read_text(encoding="utf-8"))
GOOD = {"prompt": "1+1?", "answer": "2"}


def read(path, with_gold=False, **settings):
    return read_rows(PromptsConfig(path=str(path), **settings), with_gold)


def stream(path, tokenizer=None, texts=NO_TEXTS, **settings):
    config = PromptsConfig(path=str(path), shuffle=False, **settings)
    return PromptStream(config, tokenizer or ChatCharTokenizer(), 0, texts=texts)


def texts_of(prompts):
    return [CharTokenizer().decode(prompt.tokens.tolist()) for prompt in prompts.all_prompts()]


def questions(expected):
    """Question, or turns of a chat, of each row."""
    if "chats" not in expected:
        return expected["questions"]
    return [tuple(map(tuple, chat)) for chat in expected["chats"]]


def test_every_file_has_its_expectation():
    assert {path.name for path in LAYOUTS.iterdir()} == {*EXPECTED, "expected.yaml"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_published_layout_is_known_by_its_columns(name):
    expected = EXPECTED[name]
    rows = read(LAYOUTS / name)
    (layout,) = rows.layouts
    assert layout.startswith(f"{expected['layout']} (")
    assert [row.chat or row.prompt for row in rows.rows] == questions(expected)
    assert [row.answer for row in rows.rows] == expected["answers"]
    assert all(row.chat is None or row.prompt == row.chat[-1][1] for row in rows.rows)
    left_out = {reason: left.count for reason, left in rows.left_out.items()}
    wanted = expected.get("left_out", {})
    assert len(left_out) == len(wanted)
    for word, count in wanted.items():
        assert [n for reason, n in left_out.items() if word in reason] == [count]


@pytest.mark.parametrize("name", EXPECTED)
def test_prepare_writes_what_train_reads(name, tmp_path):
    output = tmp_path / "out.jsonl"
    (report,) = prepare(Preparation(datasets=(str(LAYOUTS / name),)), output)
    before, after = read(LAYOUTS / name), read(output)
    assert report.layout.startswith(f"{EXPECTED[name]['layout']} (")
    assert [row.chat or row.prompt for row in after.rows] == questions(EXPECTED[name])
    assert [row.answer for row in after.rows] == [row.answer for row in before.rows]


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"]
)
def test_a_format_gives_the_rows_that_jsonl_gives(kind, tmp_path):
    rows = [{"prompt": f'{n}+1, "½"?\nnow', "answer": str(n + 1)} for n in range(7)]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        # Three row groups, of which the last one is smaller.
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    else:
        opened = gzip.open if kind.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            if kind.startswith("csv"):
                writer = csv.DictWriter(file, ["prompt", "answer"])
                writer.writeheader()
                writer.writerows(rows)
            elif kind.startswith("jsonl"):
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                json.dump(rows, file, indent=2)
    found = read(path).rows
    assert [(row.prompt, row.answer) for row in found] == [
        (row["prompt"], row["answer"]) for row in rows
    ]
    assert {row.source for row in found} == {"data"}


def test_json_lines_under_the_name_json_are_read(write_jsonl):
    assert [row.line for row in read(write_jsonl(GOOD, GOOD, name="data.json")).rows] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"prompt": "1?", ', r"a\.json: not JSON: "),
        ("a.json", b'["\xff"]', r"a\.json: not UTF-8 at byte 3"),
        ("a.csv", b"prompt,answer\n1?,2,3\n", r"line 2: has not 2 columns"),
        ("a.csv", b"prompt,answer\n1?\n", r"line 2: has not 2 columns"),
        ("a.csv", b'prompt,answer\n"1?,2\n', r"a\.csv: not CSV after line 1: unexpected end of"),
        ("a.csv", b"prompt,answer\n\xff,2\n", r"a\.csv: not UTF-8"),
        ("a.jsonl.gz", b"not packed", r"a\.jsonl\.gz: cannot be read \(Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"prompt": "1?"}\n', mtime=0)[:-9],
            r"cannot be read \(Compressed file ended",
        ),
    ],
)
def test_a_broken_file_of_each_format_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(path)


def test_a_line_that_never_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"1" * 10**6))
    with pytest.raises(InputError, match="line 1 has more than 1000 bytes"):
        read(path)


def test_a_folder_is_read_by_the_split_that_names_say(write_jsonl, tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "own_test", "validation"):
        write_jsonl({**GOOD, "prompt": f"{name}?"}, name=f"{name}.jsonl")
    rows = read(tmp_path)
    assert [row.prompt for row in rows.rows] == [
        "train-00000-of-00002?",
        "train-00001-of-00002?",
    ]
    assert rows.notes == [
        f"{tmp_path}: train-00000-of-00002.jsonl, train-00001-of-00002.jsonl read; "
        "own_test.jsonl, validation.jsonl left out, of another split than train"
    ]
    assert [row.prompt for row in read(tmp_path, split="test").rows] == ["own_test?"]
    assert [row.prompt for row in read(tmp_path, split="dev").rows] == ["validation?"]
    with pytest.raises(InputError, match=r"no file is of the split 'final'.*test, train, valid"):
        read(tmp_path, split="final")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("training_set.v2", "train"),
        ("trainData", "train"),
        ("MathTrain-00001-of-00003", "train"),
        ("gsm8k.main.train", "train"),
        ("TRAIN", "train"),
        ("testing", "test"),
        ("test-00000-of-00001", "test"),
        ("math.test.filtered", "test"),
        ("mathTest", "test"),
        ("testset", "test"),
        ("test2", "test"),
        ("train_vs_test", "test"),
        ("holdout", "heldout"),
        ("held_out", "heldout"),
        ("held-out.questions", "heldout"),
        ("heldOut", "heldout"),
        ("math_dev", "validation"),
        ("devset", "validation"),
        ("eval_questions", "eval"),
        ("algebra", None),
        ("contest", None),
        ("latest", None),
        ("constraining", None),
        ("aime24", None),
        ("attestation", None),
    ],
)
def test_the_split_that_a_name_says(name, split):
    for ending in (".jsonl", ".csv.gz", ".parquet"):
        assert split_of(Path(f"{name}{ending}")) == split


@pytest.mark.parametrize(("train", "other"), [("train", "holdout"), ("trainData", "testData")])
def test_a_folder_never_mixes_splits_however_names_spell_them(train, other, write_jsonl, tmp_path):
    write_jsonl({**GOOD, "prompt": "train?"}, name=f"{train}.jsonl")
    write_jsonl({**GOOD, "prompt": "other?"}, name=f"{other}.jsonl")
    rows = read(tmp_path)
    assert [row.prompt for row in rows.rows] == ["train?"]
    assert f"{other}.jsonl left out" in rows.notes[0]


def test_files_without_a_split_are_one_set_and_never_mixed_with_those_of_a_split(
    write_jsonl, tmp_path
):
    write_jsonl(GOOD, name="algebra.jsonl")
    write_jsonl(GOOD, name="contest.jsonl")  # no split, though "test" is in the name
    assert (len(read(tmp_path).rows), read(tmp_path).notes) == (2, [])
    test = write_jsonl(GOOD, name="test.jsonl")
    rows = read(tmp_path)
    assert len(rows.rows) == 2
    assert rows.notes == [
        f"{tmp_path}: algebra.jsonl, contest.jsonl read; test.jsonl left out, of another split "
        "than train"
    ]
    with pytest.raises(InputError) as error:
        read(tmp_path, split="test")
    assert "algebra.jsonl, contest.jsonl say none" in str(error.value)
    assert str(error.value).endswith(f"set prompts.path=[{test}]")


def test_what_a_folder_holds_beside_the_files_read_is_named(write_jsonl, tmp_path):
    write_jsonl(GOOD, name="train.jsonl")
    for name in ("README.md", "LICENSE", ".gitattributes", "train.jsonl.manifest.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()
    assert read(tmp_path).notes == []
    (tmp_path / "more" / "of").mkdir(parents=True)
    write_jsonl(GOOD, name="more/of/a.jsonl")
    for name in ("train2.jsonl.zst", "meta.json"):
        (tmp_path / name).write_text("{}")
    assert read(tmp_path).notes == [
        f"{tmp_path}: train.jsonl read; meta.json, more/, train2.jsonl.zst passed over, which are "
        "no such files"
    ]


def test_a_json_file_that_says_its_split_is_data_beside_others(write_jsonl, tmp_path):
    write_jsonl(GOOD, name="train.jsonl")
    write_jsonl({**GOOD, "prompt": "test?"}, name="test.json")
    assert [row.prompt for row in read(tmp_path, split="test").rows] == ["test?"]


def test_one_set_in_two_formats_is_not_read_twice(write_jsonl, tmp_path):
    write_jsonl(GOOD, name="train.jsonl")
    write_jsonl(GOOD, name="train.json")
    with pytest.raises(InputError, match=r"train\.json and train\.jsonl have one name"):
        read(tmp_path)


def test_a_clone_of_a_hub_set_is_read_and_its_descriptions_are_not(write_jsonl, tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(GOOD, name="data/train.jsonl")
    for name in ("dataset_infos.json", "train.jsonl.manifest.json", ".cache.json"):
        write_jsonl({"any": 1}, name=name)
    assert len(read(tmp_path).rows) == 1
    (tmp_path / "data" / "train.jsonl").rename(tmp_path / "moved.txt")
    (tmp_path / "main").mkdir()
    write_jsonl(GOOD, name="main/train.jsonl")
    with pytest.raises(InputError, match=r"Name one of the directories below it: main$"):
        read(tmp_path)


def test_keys_may_lie_within_others(write_jsonl):
    path = write_jsonl(
        {"task": {"text": "1+1?"}, "truth": {"values": ["2", "3"]}, "a.b": "4", "a": {"b": "5"}}
    )
    (row,) = read(path, prompt_key="task.text", answer_key="truth.values.1").rows
    assert (row.prompt, row.answer) == ("1+1?", "3")
    assert read(path, prompt_key="task.text", answer_key="a.b").rows[0].answer == "4"
    with pytest.raises(InputError, match=r"prompts\.answer_key='truth\.none': no such column"):
        read(path, prompt_key="task.text", answer_key="truth.none")


def test_an_answer_whose_column_is_named_is_taken_as_it_stands(write_jsonl):
    path = write_jsonl({"question": "1+1?", "answer": "1+1=2\n#### 2"})
    assert read(path).rows[0].answer == "2"
    assert read(path, answer_key="answer").rows[0].answer == "1+1=2\n#### 2"
    assert read(path, prompt_key="question").rows[0].answer == "2"


@pytest.mark.parametrize("named", [{}, {"prompt_key": "problem"}])
def test_naming_the_columns_of_a_layout_keeps_its_marks_and_its_solution(named, write_jsonl):
    rows = [
        {"problem": f"{n}?", "question_type": "other", "problem_is_valid": "Yes", **changes}
        for n, changes in enumerate(
            (
                {"answer": "1", "solution": ""},
                {"answer": "proof", "solution": r"\boxed{2}"},
                {"answer": None, "solution": r"\boxed{3}"},
                {"answer": "4", "problem_is_valid": "Incomplete", "solution": ""},
                {"answer": "5", "question_type": "proof", "solution": ""},
                {"answer": "notfound", "solution": "It is so."},
            )
        )
    ]
    found = read(write_jsonl(*rows), answer_key="answer", **named)
    assert [row.answer for row in found.rows] == ["1", "2", "3"]
    assert [left.count for left in found.left_out.values()] == [2, 1]
    assert next(iter(found.layouts)).startswith("NuminaMath-1.5 (")


CHAT = [{"role": "user", "content": "it's 1+1\n?"}]


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_a_csv_file_may_hold_lists_and_objects_as_json_or_as_python_writes_them(written, tmp_path):
    path = tmp_path / "chats.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "reward_model"])
        writer.writerow([written(CHAT), written({"ground_truth": "34", "style": "rule"})])
        writer.writerow([written(CHAT), written({"ground_truth": ["35"]})])
    rows = read(path)
    assert [(row.chat, row.answer) for row in rows.rows] == [
        ((("user", "it's 1+1\n?"),), "34"),
        ((("user", "it's 1+1\n?"),), "35"),
    ]
    assert next(iter(rows.layouts)).startswith("verl (")


@pytest.mark.parametrize(
    "prompt",
    [
        "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]",  # NumPy's
        "[{'role': 'user', 'content': open('x')}]",
        "[{'role': 'user', 'role': 'system', 'content': 'a'}]",
        "[" * 50 + "{'role': 'user', 'content': 'a'}" + "]" * 50,
        "[{'role': 'user', 'content': '" + "a" * (1 << 18) + "'}]",
        "['1+1?']",
        "['1+1?' '2+2?']",
        "{'question': '1+1?'}",
    ],
)
def test_what_is_the_text_of_a_list_is_never_a_question(prompt, write_jsonl):
    with pytest.raises(InputError, match=r"data\.jsonl: 1 unusable row\n  line 1: "):
        read(write_jsonl({"prompt": prompt, "answer": "2"}))


@pytest.mark.parametrize("answer", ["['2' '3']", "{'answer': '2'}", "array(['2'], dtype=object)"])
def test_what_is_the_text_of_a_list_is_never_an_answer(answer, write_jsonl):
    for rows in ({"prompt": "1+1?", "answer": answer}, {"problem": "1+1?", "answer": answer}):
        with pytest.raises(InputError, match="is the text of a list or an object"):
            read(write_jsonl(rows))


@pytest.mark.parametrize("answer", ["[1, 2]", "{1, 2}", "[a, b]", "[0, 1)", "{x: x > 1}", "[]"])
def test_intervals_and_sets_are_answers(answer, write_jsonl):
    (row,) = read(write_jsonl({"prompt": "1+1?", "answer": answer})).rows
    assert row.answer == answer


def test_a_layout_is_known_though_the_first_rows_are_broken(write_jsonl):
    rows = [{"problem": f"{n}?", "solution": rf"\boxed{{{n}}}"} for n in range(150)]
    read_rows = read(write_jsonl("{broken", {"problem": "p?"}, *rows), max_unusable_frac=0.02)
    assert (len(read_rows.rows), read_rows.unusable.num_problems) == (150, 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "robot", "content": "1?"}], "prompt: the role 'robot' is none of system, user"),
        ([{"role": "assistant", "content": "1?"}], "prompt: no message has the role user"),
        ([{"role": "user", "content": ""}], "prompt.content='': must not be empty"),
        ([{"role": "user"}], "prompt.content=None: must be text"),
        ([{"content": "1?"}], "a message has role and content"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "u"}]}],
            "a message may hold text alone",
        ),
        ([GOOD, "1?"], "must be text"),
        ([], "prompt=[]: must be text"),
    ],
)
def test_a_chat_that_cannot_be_used_says_why(prompt, message, write_jsonl):
    path = write_jsonl(GOOD, {"prompt": prompt, "answer": "2"})
    with pytest.raises(InputError) as error:
        read(path)
    assert f"line 2: {message}" in str(error.value) or message in str(error.value)


def test_a_chat_is_rendered_whole_and_keeps_its_own_system_turn(write_jsonl):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]
    path = write_jsonl(
        {
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": parts}],
            **ANSWER,
        },
        {
            "prompt": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "A"}],
            **ANSWER,
        },
        {
            "prompt": [
                {"from": "human", "value": "3?"},
                {"from": "gpt", "value": "B"},
                {"from": "human", "value": "4?"},
            ],
            **ANSWER,
        },
    )
    # The paper's texts belong to questions that are text; a chat says all that it wants said.
    plain = stream(path, texts=FOR_MATHEMATICS)
    assert texts_of(plain) == [
        "[system]S[user]1+1?[assistant]",
        "[user]2?[assistant]",
        "[user]3?[assistant]B[user]4?[assistant]",
    ]
    assert plain.report.num_own_system == 1
    told = stream(path, texts=FOR_MATHEMATICS, system="T", instruction="I")
    assert texts_of(told) == [
        "[system]S[user]1+1? I[assistant]",
        "[system]T[user]2? I[assistant]",
        "[system]T[user]3?[assistant]B[user]4? I[assistant]",
    ]


ANSWER = {"answer": "2"}


def test_several_turns_need_a_chat_template(write_jsonl):
    one = {"prompt": [{"role": "user", "content": "1?"}], **ANSWER}
    two = {"prompt": [{"role": "system", "content": "S"}, *one["prompt"]], **ANSWER}
    assert texts_of(stream(write_jsonl(one), CharTokenizer(), template="Q: {prompt}")) == ["Q: 1?"]
    path = write_jsonl(one, two)
    with pytest.raises(InputError, match=r"data:2 is a chat of several turns \(system, user\)"):
        stream(path, CharTokenizer())
    with pytest.raises(
        InputError, match=r"takes the text of one turn.*Leave prompts\.template out"
    ):
        stream(path, template="Q: {prompt}")


def test_a_control_token_in_any_turn_is_found(write_jsonl):
    chat = [{"role": "system", "content": "<eos>"}, {"role": "user", "content": "1?"}]
    path = write_jsonl({"prompt": chat, **ANSWER})
    with pytest.raises(InputError, match="data:1: spells the tokenizer's control token '<eos>'"):
        stream(path)


def test_the_responses_of_chats_are_imitated_without_an_answer(write_jsonl):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}]
    (row,) = read(write_jsonl({"messages": turns}), with_gold=True).rows
    assert (row.prompt, row.response, row.answer) == ("1+1?", "two", "")
    path = write_jsonl({"messages": turns[:1]})
    with pytest.raises(InputError, match="line 1: response=None: must be text"):
        read(path, with_gold=True)


def test_a_benchmark_loses_no_row_in_silence(write_jsonl):
    rows = [{"problem": "1?", "answer": "1"}] * 200 + [{"problem": "2?", "answer": "notfound"}]
    path = write_jsonl(*rows)
    assert len(read(path).rows) == 200
    with pytest.raises(InputError, match="line 201: no final answer\nMend these rows; with fewer"):
        read_rows(PromptsConfig(path=str(path)), False, is_benchmark=True)


def test_where_no_row_has_an_answer_the_reasons_are_told(write_jsonl):
    path = write_jsonl({"problem": "1?", "solution": "It is so."})
    with pytest.raises(
        InputError, match=r"no row is left\n  1 of 1: no final answer, such as data:1"
    ):
        stream(path)
