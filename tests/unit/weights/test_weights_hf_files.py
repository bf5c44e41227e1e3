import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from weights_models import ARCHS, hf_tensors, write_checkpoint

from megatron_rl.errors import InputError
from megatron_rl.weights.hf_files import (
    INDEX,
    HfCheckpoint,
    copy_companions,
    file_name,
    plan_files,
    write_index,
)
from megatron_rl.weights.layouts import hf_pieces, hf_shapes, is_behind

ARCH, TIED = ARCHS["qwen2"], ARCHS["qwen2_tied"]
GATE = "model.layers.1.mlp.gate_proj.weight"


def opened(directory, arch=ARCH):
    return HfCheckpoint(directory, hf_shapes(arch))


def test_whole_tensors_are_read_from_one_file_or_many(tmp_path):
    tensors = hf_tensors(ARCH)
    single = write_checkpoint(tmp_path / "single", tensors)
    nbytes = {name: tensor.nbytes for name, tensor in tensors.items()}
    files = plan_files(nbytes, limit_bytes=3000)
    assert len(files) > 3
    assert [name for names in files for name in names] == list(tensors)
    many = tmp_path / "many"
    many.mkdir()
    for number, names in enumerate(files):
        save_file({name: tensors[name] for name in names}, many / file_name(number, len(files)))
        assert sum(nbytes[name] for name in names) <= 3000 or len(names) == 1
    write_index(many, files, sum(nbytes.values()))
    for directory in (single, many):
        params = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        opened(directory).fill(params, hf_pieces(hf_shapes(ARCH)))
        assert all(torch.equal(params[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "box", [((3, 9), (0, 8)), ((0, 12), (2, 5)), ((5, 6), (7, 8)), ((0, 12), (0, 8))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_rectangle_is_read_and_cast(tmp_path, monkeypatch, box, dtype):
    monkeypatch.setattr("megatron_rl.weights.tensor_file.STAGING_BYTES", 100)  # three rows
    tensors = hf_tensors(ARCH)
    checkpoint = opened(write_checkpoint(tmp_path, tensors))
    (top, bottom), (left, right) = box
    into = torch.full((bottom - top, right - left), torch.nan, dtype=dtype)
    checkpoint.read(GATE, box, into)
    assert torch.equal(into, tensors[GATE][top:bottom, left:right].to(dtype))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"dtype": "float32", "x": 1}, None),
        ({"x": 1}, None),  # readers go by the weights then
    ],
)
def test_config_json_names_the_dtype_that_is_written(tmp_path, written, expected):
    source = tmp_path / "source"
    source.mkdir()
    text = json.dumps(written, separators=(" ,", " :"))
    (source / "config.json").write_text(text)
    (source / "merges.txt").write_bytes(b"a b\r\n")
    (source / "notes.md").write_text("not part of a model")
    copy_companions(source, tmp_path / "output", torch.float32)
    copy = (tmp_path / "output" / "config.json").read_text()
    assert copy == text if expected is None else json.loads(copy) == expected
    assert (tmp_path / "output" / "merges.txt").read_bytes() == b"a b\r\n"
    assert not (tmp_path / "output" / "notes.md").exists()


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


def retold(content, tensor, **fields):
    """A safetensors file whose header says something else of one tensor."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[tensor] |= fields
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:4],
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b"\0" * 64,
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:8] + b"[" + content[9:],
        lambda content: content[:8] + b" " * 50 + content[58:],
        lambda content: retold(content, GATE, data_offsets=[0, 384]),  # where another one stands
        lambda content: retold(content, GATE, shape=[12, 9]),
        lambda content: retold(content, GATE, shape=None),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write_checkpoint(tmp_path, hf_tensors(ARCH)) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
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
    found, said = "b.safetensors", "a.safetensors"
    assert weight_map[GATE] == found
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map | {GATE: said}}))
    with pytest.raises(InputError, match=f"it says that {GATE} is in {said}, .* it is in {found}"):
        opened(directory)


def test_an_index_without_a_tensor_that_a_shard_holds_is_refused(sharded):
    """transformers takes such a directory and leaves the tensor at its initial value."""
    directory, weight_map = sharded
    del weight_map[GATE]
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=f"says that {GATE} is in no file, .* in b.safetensors"):
        opened(directory)


def test_an_index_with_a_tensor_that_no_shard_holds_is_refused(sharded):
    directory, weight_map = sharded
    more = weight_map | {"model.layers.99.ghost.weight": "a.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": more}))
    with pytest.raises(InputError, match=r"layers\.99\.ghost\.weight is in a\.saf.* in no file"):
        opened(directory)


def test_an_index_that_leads_out_of_its_directory_is_refused(sharded):
    directory, weight_map = sharded
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map | {GATE: "../a"}}))
    with pytest.raises(InputError, match=r"'\.\./a' is no file of its directory"):
        opened(directory)


def test_a_tensor_in_two_shards_is_refused(sharded):
    directory, _ = sharded
    tensors = hf_tensors(ARCH)
    names = list(tensors)[19:]
    save_file({name: tensors[name] for name in names}, directory / "b.safetensors")
    with pytest.raises(InputError, match=f"{names[0]} is also in a.safetensors"):
        opened(directory)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "not JSON"), ('{"metadata": {}}', "not a safetensors index")],
)
def test_an_unreadable_index_is_refused(sharded, text, problem):
    directory, _ = sharded
    (directory / INDEX).write_text(text)
    with pytest.raises(InputError, match=f"{INDEX}: {problem}"):
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


def test_layers_behind_the_last_one_are_left_out_where_a_family_may_have_them(tmp_path):
    glm = ARCHS["glm4_moe"]
    tensors = hf_tensors(glm)
    behind = f"model.layers.{glm.num_layers}.eh_proj.weight"
    directory = write_checkpoint(tmp_path, {**tensors, behind: torch.ones(2, 2)})
    found = HfCheckpoint(directory, hf_shapes(glm), partial(is_behind, glm))
    assert found.dtypes.keys() == tensors.keys()
    with pytest.raises(InputError, match=rf"1 not known \['{behind}'\]"):
        opened(directory, glm)
    assert not is_behind(glm, f"model.layers.{glm.num_layers + 1}.mlp.gate.weight")
    assert not is_behind(glm, f"model.layers.{glm.num_layers - 1}.mlp.gate.weight")
    assert not is_behind(ARCH, f"model.layers.{ARCH.num_layers}.mlp.gate.weight")
