"""Prompt files from rows in the published formats, written by hand here."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megatron_rl.commands.prompt_files import (
    BAD_ANSWER,
    CONTROL_TOKEN,
    HELD_OUT,
    OVERLONG,
    UNREADABLE,
    Preparation,
    manifest_path,
    prepare,
)
from megatron_rl.commands.published import PUBLISHED, find_published
from megatron_rl.errors import InputError
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.final_answer import MARKED, NO_ANSWER, SEVERAL, final_answer
from megatron_rl.prompts.rows import LeftOutError
from megatron_rl.prompts.tokenizer import load_tokenizer

SHARED = Path(__file__).parents[4] / "shared" / "data"

# data set, a row as published (on the hub or in the authors' files), question and answer by hand
ROWS = [
    ("numina_math", {"problem": "1+1?", "answer": "2", "id": 7}, ("1+1?", "2")),
    (
        "numina_math",
        {"source": "amc", "problem": "1+1?", "solution": r"So \boxed{2}.", "messages": []},
        ("1+1?", "2"),
    ),
    (
        "math",
        {"problem": "x?", "level": "Level 5", "type": "Algebra", "solution": r"$\boxed{\frac12}$"},
        ("x?", r"\frac12"),
    ),
    (
        "math500",
        {"problem": "p?", "solution": r"\boxed{9}", "answer": r"\text{Evelyn}", "unique_id": "a"},
        ("p?", r"\text{Evelyn}"),
    ),
    (
        "math500",
        {"question": "p?", "answer": r"First \boxed{3}. So $\boxed{p - q}.$The answer is: p - q"},
        ("p?", "p - q"),
    ),
    ("math500", {"question": "p?", "answer": "So it is half.The answer is: 0.5"}, ("p?", "0.5")),
    ("minerva_math", {"question": "m?", "answer": "4.5e33"}, ("m?", "4.5e33")),
    (
        "minerva_math",
        {"problem": "m?", "solution": "\\[L=\\boxed{4.5e33\n} \\mathrm{ergs}\\]", "idx": 0},
        ("m?", "4.5e33"),
    ),
    (
        "olympiadbench",
        {"question": "o?", "final_answer": ["$69$", "$84$"], "solution": ["..."], "unit": None},
        ("o?", "$69$, $84$"),
    ),
    (
        "gsm8k",
        {"question": "How many?", "answer": "9 * 2 = $<<9*2=18>>18\n#### 1,018"},
        ("How many?", "1,018"),
    ),
    (
        "aime24",
        {"id": 60, "problem": "a?", "solution": r"\boxed{24}", "answer": "204", "question": "a?"},
        ("a?", "204"),
    ),
    ("amc23", {"id": 0, "question": "c?", "answer": 27.0, "url": "u"}, ("c?", "27")),
]


def _prepared(output, *datasets, **settings):
    reports = prepare(Preparation(datasets=tuple(map(str, datasets)), **settings), output)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return rows, reports


@pytest.mark.parametrize(("name", "row", "expected"), ROWS, ids=lambda value: str(value)[:12])
def test_a_row_of_every_published_format(name, row, expected, write_jsonl, tmp_path):
    path = write_jsonl(row)
    rows, _ = _prepared(tmp_path / "out.jsonl", f"{name}={path}")
    prompt, answer = expected
    assert rows == [{"prompt": prompt, "answer": answer, "source": name, "id": f"{name}:1"}]


def test_every_known_set_has_a_row_above():
    assert {name for name, _, _ in ROWS} == set(PUBLISHED)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (0.5, "0.5"),
        (-3, "-3"),
        (True, None),
        (None, None),
        (float("nan"), None),
        ({"a": 1}, None),
        ("  ", None),
        ([], None),
        (["1", ""], None),
        (["1", 1.0], "1"),
        ("['42']", "42"),
        ('["42"]', "42"),
        ("a #### b #### c", "c"),
        ("####", None),
        (r"\boxed{1} or \boxed{2", None),  # the last box is cut: the solution was
    ],
)
def test_final_answer(value, answer):
    assert final_answer(value) == answer


@pytest.mark.parametrize("value", [["1", 2.0], ("1", "2"), '["1", "2"]', "['1', '2']"])
def test_a_list_of_several_answers_is_one_only_where_its_set_says_so(value):
    with pytest.raises(LeftOutError, match="several answers"):
        final_answer(value)
    assert final_answer(value, joins=True) == "1, 2"


def test_the_shards_of_a_set_are_one_set(write_jsonl, tmp_path):
    (tmp_path / "shards").mkdir()
    for number in (0, 1):
        rows = [{"problem": f"{number}+{n}?", "answer": str(number + n)} for n in (1, 2)]
        write_jsonl(*rows, name=f"shards/train-0000{number}-of-00002.jsonl")
    rows, reports = _prepared(tmp_path / "out.jsonl", f"numina_math={tmp_path / 'shards'}")
    assert [row["id"] for row in rows] == [f"numina_math:{n}" for n in (1, 2, 3, 4)]
    assert {row["source"] for row in rows} == {"numina_math"}
    assert [report.num_read for report in reports] == [2, 2]
    twice = f"numina_math={tmp_path / 'shards' / 'train-00000-of-00002.jsonl'}"
    with pytest.raises(InputError, match="two sets are called 'numina_math'"):
        _prepared(tmp_path / "out.jsonl", twice, twice)


def test_what_is_left_out_is_counted_with_its_reason(write_jsonl, tmp_path):
    path = write_jsonl(
        {"problem": "good?", "answer": "1"},
        "{broken",
        {"problem": "", "answer": "1"},
        {"problem": 5, "answer": "1"},
        {"problem": "no answer?", "answer": None},
        {"problem": "proof?", "answer": "  "},
        {"problem": "unbalanced?", "answer": r"\frac{1}{2"},
        {"problem": "what percent is it?", "answer": "50"},
        b'{"problem": "\\ud800?", "answer": "1"}',
    )
    rows, (report,) = _prepared(tmp_path / "out.jsonl", path)
    assert [(row["prompt"], row["answer"], row["id"]) for row in rows] == [
        ("good?", "1", "data:1"),
        ("what percent is it?", r"50\%", "data:8"),
    ]
    counts = {reason: dropped.count for reason, dropped in report.dropped.items()}
    assert counts == {UNREADABLE: 4, NO_ANSWER: 2, BAD_ANSWER: 1}
    assert (report.num_read, report.num_kept) == (9, 2)
    assert report.dropped[BAD_ANSWER].examples == [
        "data:7: its braces are not balanced, so no box can hold it"
    ]
    assert report.dropped[UNREADABLE].examples[0].startswith("data:2: not JSON")
    manifest = json.loads(manifest_path(tmp_path / "out.jsonl").read_text())
    assert manifest["sources"][0]["dropped"][NO_ANSWER] == {
        "count": 2,
        "examples": ["data:5", "data:6"],
    }


NUMINA_1_5 = {  # columns as published
    "problem": "?",
    "solution": "...",
    "answer": "7",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
    "source": "olympiads",
    "synthetic": False,
}


def test_placeholders_and_what_a_set_marks_as_invalid_are_left_out(write_jsonl, tmp_path):
    changes = [
        {},
        {"answer": "proof", "question_type": "proof"},
        {"answer": "x > 0", "question_type": "proof"},
        {"answer": "notfound"},
        {"answer": "notfound", "solution": r"Thus \boxed{12}."},
        {"answer": None, "solution": r"Thus \boxed{13}."},
        {"answer": None},
        {"problem_is_valid": "Incomplete"},
        {"solution_is_valid": "Problem not solved"},
        {"problem_is_valid": None},
    ]
    path = write_jsonl(*(NUMINA_1_5 | change for change in changes))
    rows, (report,) = _prepared(tmp_path / "out.jsonl", path)
    assert [(row["id"], row["answer"]) for row in rows] == [
        ("data:1", "7"),
        ("data:5", "12"),
        ("data:6", "13"),
        ("data:10", "7"),
    ]
    counts = {reason: dropped.count for reason, dropped in report.dropped.items()}
    assert counts == {MARKED: 4, NO_ANSWER: 2}
    assert report.dropped[MARKED].examples[:2] == [
        "data:2: question_type='proof'",
        "data:3: question_type='proof'",
    ]


def test_where_no_row_is_left_the_reasons_are_told_with_examples(write_jsonl, tmp_path):
    path = write_jsonl({"prompt": ["1+1?"], "answer": "2"})
    with pytest.raises(InputError, match="no row is left") as told:
        _prepared(tmp_path / "out.jsonl", path)
    assert f"  {path}: 1 of 1: {UNREADABLE}\n    data:1: prompt=['1+1?']" in str(told.value)


def test_several_answers_are_not_guessed_at(write_jsonl, tmp_path):
    path = write_jsonl(
        {"prompt": "a?", "answer": '["2", "3"]'},
        {"prompt": "b?", "answer": '["2", "2"]'},
        {"prompt": "c?", "answer": "[2, 3]"},
        {"prompt": "d?", "answer": ["2", "3"]},
        {"prompt": "e?", "answer": ["2", "2"]},
    )
    rows, (report,) = _prepared(tmp_path / "out.jsonl", path)
    assert [row["answer"] for row in rows] == ["2", "[2, 3]", "2"]
    assert report.dropped[SEVERAL].count == 2


def test_problems_of_a_held_out_set_are_left_out(write_jsonl, tmp_path):
    held_out = write_jsonl({"question": "Find $x^2$!", "answer": "#### 4"}, name="test.jsonl")
    path = write_jsonl(
        {"prompt": "find x^{2}", "answer": "4"},
        {"prompt": "7+52?", "answer": "59"},
        {"prompt": "find x", "answer": "2"},
    )
    rows, (report,) = _prepared(tmp_path / "out.jsonl", path, held_out=(str(held_out),))
    assert [row["id"] for row in rows] == ["data:2", "data:3"]
    assert report.dropped[HELD_OUT].examples == ["data:1"]


def test_text_answers_are_taken_as_they_are(write_jsonl, tmp_path):
    path = write_jsonl({"q": "What percent?", "a": "{50"})
    rows, _ = _prepared(tmp_path / "out.jsonl", path, prompt_key="q", answer_key="a", is_math=False)
    assert (rows[0]["prompt"], rows[0]["answer"]) == ("What percent?", "{50")


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_the_limit_counts_tokens_of_either_kind_of_tokenizer(
    kind, model_dir, write_jsonl, tmp_path
):
    directory = model_dir
    if kind == "sentencepiece":
        directory = tmp_path / "pieces"
        directory.mkdir()
        shutil.copy(model_dir / "tokenizer.model", directory)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.name.startswith(kind)
    # A number, a sign and the question mark are one token each.
    path = write_jsonl(
        {"prompt": "7+52?", "answer": "59"},
        {"prompt": "7+52+1?", "answer": "60"},
        {"prompt": "7<eos>?", "answer": "7"},
    )
    rows, (report,) = _prepared(
        tmp_path / "out.jsonl", path, tokenizer=tokenizer, max_prompt_tokens=4
    )
    assert [row["prompt"] for row in rows] == ["7+52?"]
    assert report.dropped[OVERLONG].examples == ["data:2: 6 tokens"]
    assert report.dropped[CONTROL_TOKEN].examples == ["data:3: '<eos>'"]
    assert report.num_kept == 1
    stream = PromptStream(PromptsConfig(path=str(tmp_path / "out.jsonl")), tokenizer, seed=0)
    (prompt,) = stream.all_prompts()
    assert prompt.tokens.tolist() == [11, 104, 56, 108]


def test_parquet_holds_what_jsonl_holds_and_the_manifest_its_checksum(write_jsonl, tmp_path):
    datasets = pytest.importorskip("datasets")
    one = write_jsonl({"prompt": "½ 中?", "answer": "1"}, name="one.jsonl")
    two = write_jsonl({"prompt": "b?", "answer": "2"}, name="two.jsonl")
    rows, _ = _prepared(tmp_path / "out.jsonl", two, one)
    output = tmp_path / "new" / "out.parquet"
    prepare(Preparation(datasets=(str(two), str(one))), output)
    read = datasets.load_dataset("parquet", data_files=str(output), split="train")
    assert list(read) == rows
    assert [row["id"] for row in rows] == ["two:1", "one:1"]
    assert rows[1]["prompt"] == "½ 中?"
    manifest = json.loads(manifest_path(output).read_text())
    assert manifest["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(two.read_bytes()).hexdigest()
    assert manifest["num_problems"] == 2


def test_a_subset_keeps_the_order_and_follows_its_seed(write_jsonl, tmp_path):
    path = write_jsonl(*({"prompt": f"{n}?", "answer": str(n)} for n in range(50)))

    def subset(seed):
        rows, _ = _prepared(tmp_path / "out.jsonl", path, max_problems=20, seed=seed)
        return [int(row["answer"]) for row in rows]

    first = subset(1)
    assert len(set(first)) == 20
    assert first == sorted(first)
    assert first == subset(1) != subset(2)
    rows, _ = _prepared(tmp_path / "out.jsonl", path, max_problems=50)
    assert [row["answer"] for row in rows] == [str(n) for n in range(50)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(write_jsonl, tmp_path, monkeypatch):
    path = write_jsonl({"prompt": "1?", "answer": "1"})
    folder = tmp_path / "data"
    folder.mkdir()
    output = folder / "out.jsonl"
    output.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_rl.commands.prompt_files.os.fsync", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left"):
        prepare(Preparation(datasets=(str(path),)), output)
    assert [file.name for file in folder.iterdir()] == ["out.jsonl"]
    assert output.read_text() == "old"


def test_errors_say_the_way_out(write_jsonl, tmp_path):
    def attempt(*datasets, output="out.jsonl", **settings):
        prepare(Preparation(datasets=tuple(map(str, datasets)), **settings), tmp_path / output)

    good = write_jsonl({"prompt": "1?", "answer": "1"})
    with pytest.raises(InputError, match=r"'numinamath'.*Did you mean numina_math"):
        attempt("numinamath")
    with pytest.raises(InputError, match=r"Known: numina_math, math,"):
        attempt("zzz")
    with pytest.raises(InputError, match=r"'absent.jsonl': there is no such file"):
        attempt("gsm8k=absent.jsonl")
    with pytest.raises(InputError, match=r"no column 'question'; the first row has 'prompt'"):
        attempt(f"gsm8k={good}")
    with pytest.raises(InputError, match=r"Name the column with --answer-key"):
        attempt(good, answer_key="gold")
    with pytest.raises(InputError, match=r"must end in \.jsonl or \.parquet"):
        attempt(good, output="out.csv")
    with pytest.raises(InputError, match="two sets are called 'data'"):
        attempt(good, good)
    empty = write_jsonl({"prompt": "1?", "answer": ""}, name="empty.jsonl")
    with pytest.raises(InputError, match="no row is left"):
        attempt(empty)
    assert not list(tmp_path.glob("*out*"))


def test_a_hub_set_is_read_with_its_subset_split_and_commit(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    commit = "0123456789abcdef0123456789abcdef01234567"

    def load_dataset(name, subset, split):
        row = {"question": f"{name} {subset} {split}", "answer": "#### 1"}
        loaded = datasets.Dataset.from_list([row])
        loaded.info.download_checksums = {f"hf://datasets/{name}@{commit}/main/0.parquet": {}}
        return loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("megatron_rl.prompts.source._check_hub", lambda name: None)
    rows, (report,) = _prepared(tmp_path / "out.jsonl", "gsm8k", split="test")
    assert [row["prompt"] for row in rows] == ["openai/gsm8k main test"]
    assert (report.revision, report.where) == (commit, "openai/gsm8k:main (hub)")
    rows, _ = _prepared(tmp_path / "out.jsonl", "owner/name")
    assert rows[0]["source"] == "owner/name"
    assert rows[0]["prompt"] == "owner/name None train"


def test_a_hub_out_of_reach_names_the_option(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses
    with pytest.raises(InputError, match=r"--dataset='openai/gsm8k:main'.*--split='train'"):
        prepare(Preparation(datasets=("gsm8k",)), tmp_path / "out.jsonl")


def test_a_local_file_keeps_the_columns_of_its_format():
    name, published = find_published("olympiadbench=here.jsonl")
    assert (name, published.path) == ("olympiadbench", "here.jsonl")
    assert published.answer == ("final_answer",)


@pytest.mark.parametrize(
    ("name", "file", "problems"),
    [
        ("math500", "math500", 500),
        ("minerva_math", "minerva_math", 272),
        ("olympiadbench", "olympiadbench", 675),
        ("gsm8k", "gsm8k_test", 1319),
        ("aime24", "aime24", 30),
        ("amc23", "amc23", 40),
    ],
)
def test_no_real_problem_is_lost(name, file, problems, tmp_path):
    path = SHARED / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip("no published problems beside the checkout")
    rows, (report,) = _prepared(tmp_path / "out.jsonl", f"{name}={path}")
    assert len(rows) == problems
    assert not report.dropped
