import json

import pytest
import torch
from safetensors.torch import save_file
from weights_models import ARCHS, hf_tensors, write_checkpoint

from megatron_rl.errors import InputError
from megatron_rl.weights.hf_files import (
    INDEX,
    HfCheckpoint,
    file_name,
    plan_files,
    write_companions,
    write_tensors,
)
from megatron_rl.weights.layouts import hf_pieces, hf_shapes

ARCH, TIED = ARCHS["qwen2"], ARCHS["qwen2_tied"]
GATE = "model.layers.1.mlp.gate_proj.weight"


def opened(directory, arch=ARCH):
    return HfCheckpoint(directory, hf_shapes(arch))


def test_whole_tensors_are_read_from_one_file_or_many(tmp_path):
    tensors = hf_tensors(ARCH)
    single = write_checkpoint(tmp_path / "single", tensors)
    files = plan_files(hf_shapes(ARCH), itemsize=4, limit_bytes=3000)
    assert len(files) > 3
    assert [name for names in files for name in names] == list(tensors)
    many = tmp_path / "many"
    many.mkdir()
    for number, names in enumerate(files):
        path = many / file_name(number, len(files))
        write_tensors(path, {name: tensors[name] for name in names})
        size = sum(4 * tensors[name].numel() for name in names)
        assert size <= 3000 or len(names) == 1
    write_companions(single, many, files, torch.float32)
    for directory in (single, many):
        params = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        opened(directory).fill(params, hf_pieces(hf_shapes(ARCH)))
        assert all(torch.equal(params[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), rf"1 tensors missing \['{GATE}'\]"),
        (lambda t: t.pop("lm_head.weight"), r"missing \['lm_head.weight'\]"),
        (lambda t: t.update({"extra.bias": torch.ones(2)}), r"1 not known \['extra.bias'\]"),
        (
            lambda t: t.update({GATE: torch.ones(12, 9)}),
            rf"{GATE} has shape \[12, 9\], but config.json means \[12, 8\]",
        ),
        (lambda t: t.update({GATE: torch.ones(8, 12)}), r"has shape \[8, 12\]"),
        (
            lambda t: t.update({GATE: torch.ones(12, 8, dtype=torch.int8)}),
            "has dtype I8: only F64, F32, F16, BF16 can be trained",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, change, message):
    tensors = hf_tensors(ARCH)
    change(tensors)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_stale_rope_buffers_are_let_be(tmp_path):
    tensors = hf_tensors(ARCH)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(1)
    opened(write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize("kept_bytes", [4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept_bytes):
    path = write_checkpoint(tmp_path, hf_tensors(ARCH)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        opened(tmp_path)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(InputError, match="Only safetensors weights are read"):
        opened(tmp_path)


def write_sharded(directory, tensors, files):
    """files: name -> tensors in it; the index tells of all of them."""
    weight_map = {}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.fixture
def sharded(tmp_path):
    tensors = hf_tensors(ARCH)
    names = list(tensors)
    files = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    return tmp_path, write_sharded(tmp_path, tensors, files)


def test_a_missing_shard_is_named(sharded):
    directory, _ = sharded
    opened(directory)
    (directory / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors: not a readable.*missing"):
        opened(directory)


def test_a_pointer_instead_of_a_shard_is_refused(sharded):
    directory, _ = sharded
    (directory / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"b\.safetensors.*git-lfs pointer"):
        opened(directory)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    directory, weight_map = sharded
    weight_map[GATE] = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[
        weight_map[GATE]
    ]
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=f"it has no tensor {GATE}"):
        opened(directory)


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}'])
def test_an_unreadable_index_is_refused(sharded, text):
    directory, _ = sharded
    (directory / INDEX).write_text(text)
    with pytest.raises(InputError, match="not a safetensors index"):
        opened(directory)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    tensors = hf_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    opened(write_checkpoint(tmp_path, tensors), TIED)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    tensors = hf_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1e-3
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        opened(tmp_path, TIED)


def test_a_tied_head_without_an_embedding_is_refused(tmp_path):
    tensors = hf_tensors(TIED)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(InputError, match=r"missing \['model\.embed_tokens\.weight'\]"):
        opened(tmp_path, TIED)
