import importlib.util
import json
import re
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
DATA = QUICKSTART / "data"


def _script(name):
    spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def make_model():
    return _script("make_model")


@pytest.fixture(scope="module")
def model_dir(make_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_model.make_model(directory, DATA / "train.jsonl", seed=0)
    return directory


def _partial_results(prompt):
    """The running totals of a chain, worked out from its signed numbers."""
    assert re.fullmatch(r"\d+([+-]\d)+\?", prompt)
    totals, total = [], 0
    for number in re.findall(r"[+-]?\d+", prompt):
        total += int(number)
        totals.append(total)
    return totals


def test_regenerated_data_are_the_shipped_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_problems.py", "--output", str(tmp_path)])
    _script("make_problems").main()
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 1_500_000


def test_another_seed_gives_other_problems():
    draw_problems = _script("make_problems").draw_problems
    assert draw_problems(50, 10, seed=0) == draw_problems(50, 10, seed=0)
    assert draw_problems(50, 10, seed=0) != draw_problems(50, 10, seed=1)


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_every_answer_is_right(name):
    for row in _rows(name):
        totals = _partial_results(row["prompt"])
        assert len(totals) == row["level"] + 1
        assert min(totals) >= 0
        assert max(totals) <= 59
        assert row["answer"] == str(totals[-1])


def _is_worked(row):
    return "=" in row["response"]


def _worked_steps(row):
    """(step as it should start, its result, whether it is right) along a worked solution."""
    value = int(re.match(r"\d+", row["prompt"])[0])
    working, boxed = row["response"].removesuffix("}").split("\\boxed{")
    for term, step in zip(re.findall(r"[+-]\d", row["prompt"]), working.split(","), strict=True):
        left, result = step.split("=")
        assert left == f"{value}{term}"  # a slip is never mended, the chain goes on from it
        yield int(result) == value + int(term)
        value = int(result)
    assert boxed == str(value)


def test_heldout_solutions_are_worked_and_right():
    rows = _rows("heldout")
    assert all(_is_worked(row) and all(_worked_steps(row)) for row in rows)
    assert all(row["response"].endswith("\\boxed{" + row["answer"] + "}") for row in rows)


def test_training_solutions_are_hasty_by_level_and_rarely_slip():
    by_level = {level: [] for level in range(1, 6)}
    for row in _rows("train"):
        by_level[row["level"]].append(row)
    for level, share in zip(range(1, 6), (0.2, 0.4, 0.6, 0.75, 0.85), strict=True):
        rows = by_level[level]
        guesses = [row for row in rows if not _is_worked(row)]
        # three standard errors of a share among 2,400 rows, and of .15 among its guesses
        assert len(guesses) / len(rows) == pytest.approx(share, abs=0.03)
        lucky = sum(row["response"] == "\\boxed{" + row["answer"] + "}" for row in guesses)
        assert lucky / len(guesses) == pytest.approx(0.15, abs=0.05)
    steps = [
        ok for rows in by_level.values() for r in rows if _is_worked(r) for ok in _worked_steps(r)
    ]
    assert 1 - sum(steps) / len(steps) == pytest.approx(0.03, abs=0.006)


def test_no_heldout_prompt_is_in_train():
    train, heldout = ([row["prompt"] for row in _rows(name)] for name in ("train", "heldout"))
    assert (len(train), len(heldout), len(set(heldout))) == (12_000, 200, 200)
    assert not set(train) & set(heldout)


def test_sentencepiece_and_hugging_face_files_agree_on_every_row(model_dir):
    import sentencepiece
    from transformers import AutoTokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(model_dir)
    texts = [
        row["prompt"] + joint + row["response"]
        for name in ("train", "heldout")
        for row in _rows(name)
        for joint in ("", "\n")
    ]
    ids = fast(texts)["input_ids"]
    assert ids == pieces.encode(texts)
    assert fast.batch_decode(ids) == pieces.decode(ids) == texts
    assert (fast.pad_token_id, fast.eos_token_id, fast.bos_token_id) == (0, 1, 2)
    assert (pieces.pad_id(), pieces.eos_id(), pieces.bos_id()) == (0, 1, 2)


def test_every_number_and_sign_is_one_token(model_dir, make_model):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    assert [pieces.id_to_piece(token) for token in range(112)] == [
        *("<pad>", "<eos>", "<bos>", "<unk>"),
        *(str(number) for number in range(100)),
        *("+", "-", "=", ",", "?", "\n", "\\boxed{", "}"),
    ]
    assert pieces.get_piece_size() == make_model.VOCAB_SIZE == 112
    assert pieces.encode("99\\boxed{100}") == [103, 110, 14, 4, 111]  # a hundred is 10, 0


def test_the_model_is_the_seeds_and_small(model_dir, make_model, tmp_path):
    import torch
    from safetensors.torch import load_file

    config = json.loads((model_dir / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["eos_token_id"]) == ("qwen2", 112, 1)
    assert json.loads((model_dir / "generation_config.json").read_text())["eos_token_id"] == 1
    weights = load_file(model_dir / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # embedding and head 2 * 112 * 64; a layer: q, k and v 3 * (64 * 64 + 64), o 64 * 64,
    # mlp 3 * 64 * 256, norms 2 * 64; final norm 64
    assert sum(tensor.numel() for tensor in weights.values()) == 14_336 + 2 * 65_856 + 64
    assert make_model.write_model(tmp_path / "same", seed=0) == 146_112
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    make_model.write_model(tmp_path / "other", seed=1)
    other = load_file(tmp_path / "other" / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], other["lm_head.weight"])
