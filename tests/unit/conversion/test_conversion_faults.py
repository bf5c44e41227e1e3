"""Damaged, hostile and mistaken inputs: what is said, and that nothing half-made is left behind."""

import contextlib
import io
import os
import pickle
import shutil

import pytest
import torch
from conversion_models import (
    Told,
    edited_metadata,
    rename_key,
    save_tensors,
    to_hf,
    to_megatron,
    write_model,
)
from torch.distributed.checkpoint import FileSystemReader

from megatron_rl.errors import InputError
from megatron_rl.weights.dcp_files import read_metadata
from megatron_rl.weights.model_source import find_model

GATE = "model.layers.1.mlp.gate_proj.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
LAYER_FILE = "__0_0002.distcp"  # of layer 1


@pytest.fixture
def checkpoint(converted, tmp_path):
    """One's own copy, to be damaged."""
    return shutil.copytree(converted, tmp_path / "checkpoint")


def refused(checkpoint, output, message):
    with pytest.raises(InputError, match=message):
        to_hf(checkpoint, output)
    assert not output.exists()


# -- Hugging Face side ---------------------------------------------------------------------------


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "model-1.safetensors"), "model-1.*truncated"),
        (lambda folder: (folder / "model-1.safetensors").unlink(), "model-1.*missing"),
        (
            lambda folder: (folder / "model-1.safetensors").rename(folder / "model-9.safetensors"),
            "model-1.*missing",
        ),
    ],
)
def test_a_damaged_source_is_refused_before_anything_is_written(tmp_path, damage, message):
    write_model("qwen2", tmp_path / "hf", num_files=3)
    damage(tmp_path / "hf")
    with pytest.raises(InputError, match=message):
        to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"1 tensors missing .*{GATE}"),
        (lambda t: t.update({"model.extra.bias": torch.ones(2)}), "1 not known.*model.extra.bias"),
        (lambda t: t.update({GATE: t[GATE][:-1]}), f"{GATE} has shape \\[19, 16\\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, change, message):
    tensors = write_model("qwen2", tmp_path / "hf")
    change(tensors)
    save_tensors(tmp_path / "hf", tensors)
    with pytest.raises(InputError, match=message):
        to_megatron(tmp_path / "hf", tmp_path / "megatron")


def test_a_source_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_model("qwen2", tmp_path / "hf")

    def shrink(nbytes):
        os.truncate(tmp_path / "hf" / "model.safetensors", 5000)

    with pytest.raises(InputError, match="became shorter while it was read"):
        to_megatron(tmp_path / "hf", tmp_path / "megatron", progress=Told(shrink))
    assert not (tmp_path / "megatron" / "iter_0000001").exists()


def test_an_output_that_is_there_is_left_alone(model, converted, tmp_path):
    before = (converted / "metadata.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="it holds Megatron-Core checkpoints"):
        to_megatron(model, converted.parent)
    assert (converted / "metadata.json").stat().st_mtime_ns == before
    (tmp_path / "iter_0000001").mkdir()  # somebody else's: no tracker, nothing of ours in it
    with pytest.raises(InputError, match="iter_0000001: it is there already"):
        to_megatron(model, tmp_path)
    with pytest.raises(InputError, match="it is there already"):
        to_hf(converted, tmp_path)


# -- Megatron side -------------------------------------------------------------------------------


def test_a_truncated_file_of_a_checkpoint_is_named(checkpoint, tmp_path):
    cut(checkpoint / LAYER_FILE)
    refused(checkpoint, tmp_path / "hf", rf"{LAYER_FILE}: .* bytes from .* Is it truncated\?")


def test_a_missing_file_of_a_checkpoint_is_named(checkpoint, tmp_path):
    (checkpoint / LAYER_FILE).unlink()
    refused(checkpoint, tmp_path / "hf", f"names the file '{LAYER_FILE}', which is not there")


def test_metadata_that_leads_out_of_the_checkpoint_is_refused(checkpoint, tmp_path):
    with edited_metadata(checkpoint) as metadata:
        next(iter(metadata.storage_data.values())).relative_path = "../model.safetensors"
    refused(checkpoint, tmp_path / "hf", "names the file '../model.safetensors'")


@pytest.mark.parametrize("change", [(1 << 40, None), (None, 1 << 40), (-1, None)])
def test_metadata_that_points_outside_of_a_file_is_refused(checkpoint, tmp_path, change):
    with edited_metadata(checkpoint) as metadata:
        place = next(at for index, at in metadata.storage_data.items() if index.fqn == FC1)
        place.offset = place.offset if change[0] is None else change[0]
        place.length = place.length if change[1] is None else change[1]
    refused(checkpoint, tmp_path / "hf", f"{FC1} should stand in .* but the file has")


def drop_chunk(metadata):
    metadata.state_dict_metadata[FC1].chunks.pop()


def drop_place(metadata):
    del metadata.storage_data[next(i for i in metadata.storage_data if i.fqn == FC1)]


def shrink_chunk(metadata):
    chunk = metadata.state_dict_metadata[FC1].chunks[0]
    chunk.sizes = torch.Size([1, 39, 16])


def grow_chunk(metadata):
    metadata.state_dict_metadata[FC1].chunks[0].sizes = torch.Size([2, 40, 16])


def push_chunk_out(metadata):
    metadata.state_dict_metadata[FC1].chunks[0].sizes = torch.Size([1, 41, 16])


@pytest.mark.parametrize(
    "change", [drop_chunk, drop_place, shrink_chunk, grow_chunk, push_chunk_out]
)
def test_chunks_that_do_not_cover_their_tensor_once_are_refused(checkpoint, tmp_path, change):
    with edited_metadata(checkpoint) as metadata:
        change(metadata)
    refused(checkpoint, tmp_path / "hf", f"chunks of {FC1} do not cover its shape")


def test_a_tensor_that_is_missing_or_unknown_is_named(checkpoint, tmp_path):
    rename_key(checkpoint, FC1, "decoder.layers.mlp.linear_fc9.weight")
    refused(
        checkpoint, tmp_path / "hf", r"no decoder.layers.0.mlp.linear_fc1.weight, of which .*gate"
    )
    rename_key(checkpoint, "decoder.layers.mlp.linear_fc9.weight", FC1)
    with edited_metadata(checkpoint) as metadata:
        metadata.state_dict_metadata["decoder.ghost"] = metadata.state_dict_metadata[FC1]
    refused(checkpoint, tmp_path / "hf", r"1 tensors are not known \['decoder.ghost'\]")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ('"intermediate_size": 20', r"linear_fc1.weight has shape \[3, 40, 16\], .* \[3, 48, 16\]"),
        ('"num_hidden_layers": 3', r"has shape \[3, .* config.json means \[24, "),
        ('"vocab_size": 70', r"embeddings.weight has shape \[128, 16\], .* \[240, 16\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path, field, message):
    config = checkpoint / "hf_config" / "config.json"
    name, value = field.split(": ")
    more = {"20": "24", "3": "24", "70": "240"}[value]
    config.write_text(config.read_text().replace(field, f"{name}: {more}"))
    refused(checkpoint, tmp_path / "hf", message)


def test_a_damaged_record_is_named(checkpoint, tmp_path):
    path = checkpoint / LAYER_FILE
    content = path.read_bytes()
    path.write_bytes(content.replace(b"PK", b"XX"))
    refused(checkpoint, tmp_path / "hf", rf"{LAYER_FILE}: the record of .* is damaged")


def test_a_record_that_is_another_tensor_is_refused(checkpoint, tmp_path):
    with edited_metadata(checkpoint) as metadata:
        places = {i.offset: at for i, at in metadata.storage_data.items() if i.fqn == FC1}
        other = next(at for i, at in metadata.storage_data.items() if "linear_proj.weight" in i.fqn)
        place = places[torch.Size([0, 0, 0])]
        place.relative_path, place.offset, place.length = (
            other.relative_path,
            other.offset,
            other.length,
        )
    refused(checkpoint, tmp_path / "hf", rf"record of {FC1}\[0, 0, 0\] is not the \[1, 40, 16\]")


def test_what_is_no_checkpoint_says_so(checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(b"not a pickle")
    refused(checkpoint, tmp_path / "hf", "metadata: not a checkpoint's metadata")
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    refused(checkpoint, tmp_path / "hf", "not a checkpoint's metadata: a dict")
    shutil.rmtree(checkpoint / "hf_config")
    with pytest.raises(InputError, match=r"hf_config/config\.json is not there, so nothing"):
        find_model(str(checkpoint), "--megatron")


def test_a_tracker_that_names_nothing_is_refused(converted, tmp_path):
    for text in ("2", "../../etc", "latest"):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        with pytest.raises(InputError, match=r"it names .*, and there is no"):
            find_model(str(tmp_path), "--megatron")


# -- hostile files -------------------------------------------------------------------------------


class Hostile:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def by_dotted_name(mark):
    """os.mkdir as a name inside a module that is allowed."""

    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode()

    module = "torch.distributed.checkpoint.filesystem"
    return b"\x80\x04" + text(module) + text("os.mkdir") + b"\x93" + text(str(mark)) + b"\x85R."


@pytest.mark.parametrize("make", [lambda mark: pickle.dumps(Hostile(mark)), by_dotted_name])
def test_metadata_that_would_run_code_is_refused(checkpoint, tmp_path, make):
    mark = tmp_path / "ran"
    (checkpoint / ".metadata").write_bytes(make(mark))
    with pytest.raises(InputError, match="mkdir, which has no place there"):
        read_metadata(checkpoint)
    refused(checkpoint, tmp_path / "hf", "mkdir, which has no place there")
    assert not mark.exists()
    with contextlib.suppress(Exception):
        FileSystemReader(checkpoint).read_metadata()
    assert mark.exists()  # torch's own reader runs it: the test has teeth


def test_a_record_that_would_run_code_is_refused(checkpoint, tmp_path):
    mark, record = tmp_path / "ran", io.BytesIO()
    torch.save(Hostile(mark), record)
    with edited_metadata(checkpoint) as metadata:
        place = next(at for index, at in metadata.storage_data.items() if index.fqn == FC1)
        place.relative_path, place.offset = "hostile.distcp", 0
        place.length = record.getbuffer().nbytes
    (checkpoint / "hostile.distcp").write_bytes(record.getvalue())
    refused(checkpoint, tmp_path / "hf", "hostile.distcp: the record of .* is damaged")
    assert not mark.exists()
