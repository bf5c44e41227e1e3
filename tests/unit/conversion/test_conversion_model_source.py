import json
import shutil

import pytest
from conversion_models import to_megatron, write_model

from megatron_rl.errors import InputError
from megatron_rl.weights.model_source import ModelSource, find_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf/, megatron/ and a run's checkpoints/ with two of them."""
    folder = tmp_path_factory.mktemp("models")
    write_model("qwen2", folder / "hf")
    checkpoint = to_megatron(folder / "hf", folder / "megatron")
    for iteration in ("iteration_000009", "iteration_000010"):
        shutil.copytree(checkpoint, folder / "checkpoints" / iteration / "policy")
    return folder


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("megatron", "megatron/iter_0000001"),
        ("megatron/iter_0000001", "megatron/iter_0000001"),
        ("checkpoints", "checkpoints/iteration_000010/policy"),
        ("checkpoints/iteration_000009", "checkpoints/iteration_000009/policy"),
        ("checkpoints/iteration_000009/policy", "checkpoints/iteration_000009/policy"),
    ],
)
def test_every_form_of_a_megatron_checkpoint_is_found(folder, path, found):
    source = find_model(str(folder / path), "model.path")
    assert source.megatron_dir == folder / found
    assert source.config_dir == folder / found / "hf_config"


def test_a_hugging_face_directory_is_itself(folder):
    path = str(folder / "hf")
    assert find_model(path, "model.path") == ModelSource(config_dir=folder / "hf")


def test_config_and_tokenizer_may_be_elsewhere(folder, tmp_path):
    bare = shutil.copytree(folder / "megatron" / "iter_0000001", tmp_path / "bare")
    shutil.rmtree(bare / "hf_config")
    with pytest.raises(InputError, match=r"bare/hf_config/config\.json is not there"):
        find_model(str(bare), "--megatron")
    source = find_model(str(bare), "--megatron", str(folder / "hf"))
    assert source == ModelSource(config_dir=folder / "hf", megatron_dir=bare)


def test_a_place_that_is_not_there_is_named_with_its_setting(tmp_path):
    with pytest.raises(InputError, match=r"^critic\.path='.*gone': there is no such directory$"):
        find_model(str(tmp_path / "gone"), "critic.path")


def test_a_name_that_the_hub_does_not_know_is_an_input_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--hf='nobody/nothing': neither a directory here nor"):
        find_model("nobody/nothing", "--hf")


HUB = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
BESIDE = ["config.json", "tokenizer.json", "README.md", "consolidated.safetensors"]


@pytest.mark.parametrize(
    ("weights", "index"),
    [
        (SHARDS, SHARDS),
        (["model.safetensors"], None),
        (["model.safetensors"], ["a[0].safetensors"]),
        (["model.safetensors", "value_head.safetensors"], None),  # an exported critic
    ],
)
def test_of_a_hub_model_only_the_files_with_its_weights_are_downloaded(
    monkeypatch, tmp_path, weights, index
):
    """Mistral-7B-v0.3 has its weights a second time, in consolidated.safetensors: 14.5 GB."""
    from huggingface_hub.utils import filter_repo_objects

    files = [*BESIDE, *weights, *(index or []), "onnx/model.safetensors"]
    if index is not None:
        files.append("model.safetensors.index.json")
    snapshot, downloaded = tmp_path / HUB, set()
    snapshot.mkdir()

    def snapshot_download(repo_id, *, allow_patterns, revision=None):
        assert (repo_id, revision) in [("org/model", None), ("org/model", HUB)]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            downloaded.add(name)
            is_index = name.endswith(".index.json")
            content = {"weight_map": {f"tensor {file}": file for file in index or []}}
            (snapshot / name).write_text(json.dumps(content) if is_index else "")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_model("org/model", "model.path").config_dir == snapshot
    wanted = {"config.json", "tokenizer.json", *(index or weights)}
    assert downloaded - {"model.safetensors.index.json"} == wanted
