import json

import pytest

from megatron_rl.errors import InputError
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.source import read_rows

GOOD = {"prompt": "1+1?", "answer": "2"}


def _read(path, with_gold=False, **settings):
    return read_rows(PromptsConfig(path=str(path), **settings), with_gold).rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1?", "answer": ', "line 2: not JSON: Expecting value at column 29"),
        (b'{"prompt": "\xff", "answer": "2"}', "line 2: not UTF-8 at byte 13 of the line"),
        ("[" * 100_000, "line 2: not JSON that can be read: RecursionError"),
        ('{"prompt": "1?", "answer": ' + "9" * 5000 + "}", "line 2: not JSON that can be read"),
        ('["1+1?", "2"]', "line 2: ['1+1?', '2'] is not a JSON object"),
        ({"prompt": "1+1?"}, "line 2: no column 'answer'; it has 'prompt'"),
        ({"prompt": "1+1?", "answer": None}, "line 2: answer=None: must be text, a number"),
        ({"prompt": "1+1?", "answer": ""}, "line 2: answer='': must not be empty"),
        ({"prompt": "1+1?", "answer": " \n"}, "line 2: answer=' \\n': must not be empty"),
        ({"prompt": "1+1?", "answer": True}, "line 2: answer=True: must be text, a number"),
        ({"prompt": "1+1?", "answer": ["2", "3"]}, "line 2: answer=['2', '3']: must be text"),
        ({"prompt": "1+1?", "answer": {"value": 2}}, "line 2: answer={'value': 2}: must be text"),
        ({"prompt": "1+1?", "answer": float("nan")}, "line 2: answer=nan: must be finite"),
        ({"prompt": "", "answer": "2"}, "line 2: prompt='': must not be empty"),
        ({"prompt": ["1+1?"], "answer": "2"}, "line 2: prompt=['1+1?']: must be text"),
        ({"prompt": "\ud800", "answer": "2"}, "prompt='\\ud800': holds half a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_its_value_and_rule(write_jsonl, line, message):
    path = write_jsonl(GOOD, line, GOOD)
    with pytest.raises(InputError) as error:
        _read(path)
    assert str(error.value).startswith(f"{path}: 1 unusable row\n")
    assert message in str(error.value)
    assert str(error.value).isascii()


def test_all_problems_of_a_file_are_counted_and_ten_are_shown(write_jsonl):
    path = write_jsonl(GOOD, *[{"prompt": "1?", "answer": ""}] * 12)
    with pytest.raises(InputError) as error:
        _read(path)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: 12 unusable rows"
    assert [line.split(":")[0] for line in lines[1:11]] == [f"  line {n}" for n in range(2, 12)]
    assert lines[11:] == [
        "  and 2 more",
        "Mend or remove these rows, or have them skipped: prompts.max_unusable_frac=0.924",
    ]


def test_bad_rows_are_skipped_up_to_their_share(write_jsonl):
    path = write_jsonl(*[GOOD] * 150, {"prompt": "1?", "answer": ""}, "{broken", *[GOOD] * 48)
    read = read_rows(PromptsConfig(path=str(path)), False)
    assert (len(read.rows), read.num_read, read.unusable.num_problems) == (198, 200, 2)
    assert read.unusable.shown[0] == "  data:151: answer='': must not be empty"
    with pytest.raises(InputError, match=r"skipped: prompts\.max_unusable_frac=0\.01$") as error:
        _read(path, max_unusable_frac=0.009)
    told = str(error.value).rpartition("=")[2]
    assert len(_read(path, max_unusable_frac=float(told))) == 198
    with pytest.raises(InputError, match=r"2 unusable rows.*\n.*line 151.*\n.*\nMend these rows"):
        read_rows(PromptsConfig(path=str(path)), False, is_benchmark=True)


def test_a_wrong_column_name_is_one_message_with_the_columns_there_are(write_jsonl):
    path = write_jsonl(*[{"task": "1+1?", "answer": "2"}] * 50)
    with pytest.raises(InputError, match=r"prompts\.prompt_key='prompt': no such column") as error:
        _read(path, prompt_key="prompt")
    assert "which has 'task', 'answer'" in str(error.value)
    with pytest.raises(InputError, match=r"no layout that is known; the first row has 'task', 'an"):
        _read(path)
    assert [row.prompt for row in _read(path, prompt_key="task")] == ["1+1?"] * 50


def test_the_response_column_is_asked_for_only_with_gold(write_jsonl):
    path = write_jsonl(GOOD)
    assert _read(path)[0].response is None
    with pytest.raises(InputError, match=r"prompts\.response_key='response': no such column"):
        _read(path, with_gold=True)
    path = write_jsonl({**GOOD, "response": "two"})
    assert _read(path, with_gold=True)[0].response == "two"


@pytest.mark.parametrize(
    ("answer", "text"), [(27, "27"), (27.0, "27.0"), (["x"], "x"), ([0.5], "0.5"), (" 2", " 2")]
)
def test_numbers_and_lists_of_one_become_text(write_jsonl, answer, text):
    assert _read(write_jsonl({"prompt": "1?", "answer": answer}))[0].answer == text


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path):
    path = tmp_path / "windows.jsonl"
    row = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row)
    assert [(row.prompt, row.line) for row in _read(path)] == [("1+1?", 1), ("1+1?", 3)]


def test_a_directory_is_read_in_the_order_of_its_names(write_jsonl, tmp_path):
    write_jsonl({"prompt": "b", "answer": "1"}, name="b.jsonl")
    write_jsonl({"prompt": "a", "answer": "1"}, name="a.jsonl")
    write_jsonl("not data", name="README.md")
    assert [(row.prompt, row.where) for row in _read(tmp_path)] == [("a", "a:1"), ("b", "b:1")]


def test_a_list_of_paths_is_read_in_its_order(write_jsonl):
    paths = [
        str(write_jsonl({"prompt": name, "answer": "1"}, name=f"{name}.jsonl")) for name in "ba"
    ]
    assert [row.source for row in read_rows(PromptsConfig(path=paths), False).rows] == ["b", "a"]


def test_files_that_cannot_be_used_at_all(write_jsonl, tmp_path):
    with pytest.raises(InputError, match="there is no such file or directory"):
        _read(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"the ending '\.txt' is not one of \.jsonl, \.parquet"):
        _read(write_jsonl("prompt,answer", name="data.txt"))
    with pytest.raises(InputError, match="the data set has no rows"):
        _read(write_jsonl("", name="blank.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"the directory holds no \.jsonl, \.parquet, \.json or"):
        _read(tmp_path / "empty")


def test_parquet_gives_the_rows_of_the_same_jsonl(write_jsonl, tmp_path):
    import datasets

    records = [{"prompt": f"{n}+1?", "answer": n + 1.0} for n in range(5)]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "data.parquet")
    assert _read(tmp_path / "data.parquet") == _read(write_jsonl(*records))


def test_a_parquet_file_that_is_cut_off_is_named(tmp_path):
    import datasets

    path = tmp_path / "cut.parquet"
    datasets.Dataset.from_list([GOOD]).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"cut\.parquet: is not a readable parquet file"):
        _read(path)


def test_a_hub_out_of_reach_is_an_error_in_seconds(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses
    with pytest.raises(InputError, match="the hub gives no data set of that name") as error:
        _read("owner/name")
    assert "prompts.path='owner/name'" in str(error.value)
    assert "Connection refused" in str(error.value)


def test_hub_name_subset_and_split_reach_the_loader(monkeypatch):
    import datasets

    def load_dataset(name, subset, split):
        return datasets.Dataset.from_list([{**GOOD, "prompt": f"{name} {subset} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("megatron_rl.prompts.source._check_hub", lambda name: None)
    rows = _read("owner/name:main", split="test")
    assert [(row.prompt, row.source) for row in rows] == [
        ("owner/name main test", "owner/name:main")
    ]
    assert _read("owner/name")[0].prompt == "owner/name None train"
