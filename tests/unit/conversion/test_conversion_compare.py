import math

import pytest
import torch
from conversion_models import Told, save_tensors, to_megatron, write_model

from megatron_rl.conversion import compare as compare_module
from megatron_rl.conversion.compare import compare_weights, differences_of_arch
from megatron_rl.megatron.stored_files import open_weights
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model

UP = "model.layers.1.mlp.up_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.bias"


@pytest.fixture
def models(tmp_path):
    """(folder of the model, its tensors, what compares it with a changed copy)."""
    tensors = write_model("qwen2", tmp_path / "one")
    arch = read_model_config(tmp_path / "one")

    def compare(changed, tolerance=None):
        if not (tmp_path / "other").exists():
            write_model("qwen2", tmp_path / "other")
        save_tensors(tmp_path / "other", changed)
        told = Told()
        found = compare_weights(
            *(open_weights(find_model(str(tmp_path / n), n), arch) for n in ("one", "other")),
            arch,
            tolerance=tolerance,
            progress=told,
        )
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert told.totals == [sum(told.counts)] == [nbytes]
        return found

    return tmp_path / "one", tensors, compare


def changed(tensors, name, place, value):
    result = {key: tensor.clone() for key, tensor in tensors.items()}
    result[name][place] = value
    return result


def test_equal_weights_are_equal(models):
    _, tensors, compare = models
    found = compare(tensors)
    assert (found.num_tensors, found.differing, found.first) == (len(tensors), [], "")


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_the_first_difference_is_the_first_of_the_network(models, monkeypatch, block_bytes):
    monkeypatch.setattr(compare_module, "BLOCK_BYTES", block_bytes)
    _, tensors, compare = models
    both = changed(changed(tensors, UP, (17, 3), 2.5), KEY, (7,), -1.0)
    found = compare(both)
    assert found.differing == [KEY, UP]
    assert found.first == f"{KEY}[7] is {tensors[KEY][7]:.9g} and -1"
    gaps = abs(tensors[UP][17, 3] - 2.5), abs(tensors[KEY][7] + 1)
    assert found.largest == pytest.approx(max(gaps).item(), rel=1e-6)


def test_bits_count_where_no_tolerance_is_given(models):
    _, tensors, compare = models
    zero = changed(tensors, UP, (0, 0), 0.0)
    save_tensors(models[0], zero)
    assert compare(changed(zero, UP, (0, 0), -0.0)).differing == [UP]
    assert compare(changed(zero, UP, (0, 0), -0.0), tolerance=0.0).differing == []


def test_a_tolerance_bounds_every_element(models):
    _, tensors, compare = models
    moved = {name: tensor + 1e-3 for name, tensor in tensors.items()}
    assert compare(moved, tolerance=2e-3).differing == []
    assert len(compare(moved, tolerance=5e-4).differing) == len(tensors)


def test_nan_is_a_difference_unless_both_have_it(models):
    folder, tensors, compare = models
    broken = changed(tensors, UP, (0, 0), math.nan)
    found = compare(broken, tolerance=1e9)
    assert found.differing == [UP]
    assert found.first.endswith("and nan")
    save_tensors(folder, broken)
    assert compare(broken).differing == []


def test_dtypes_count_where_no_tolerance_is_given(models):
    _, tensors, compare = models
    half = tensors | {UP: tensors[UP].to(torch.bfloat16)}
    found = compare(half)
    assert found.differing == [UP]
    assert found.first == f"{UP} is torch.float32 and torch.bfloat16"
    assert compare(half, tolerance=0.02).differing == []


def test_either_kind_compares_with_either(models, tmp_path):
    folder, tensors, _ = models
    arch = read_model_config(folder)
    to_megatron(folder, tmp_path / "same")
    save_tensors(folder, changed(tensors, UP, (17, 3), 2.5))
    to_megatron(folder, tmp_path / "changed")
    weights = {
        name: open_weights(find_model(str(tmp_path / name), name), arch)
        for name in ("one", "same", "changed")
    }

    def differing(one, other):
        return compare_weights(
            weights[one], weights[other], arch, tolerance=None, progress=Told()
        ).differing

    assert differing("one", "changed") == []  # the directory holds the changed weights now
    assert differing("same", "changed") == [UP]
    assert differing("same", "one") == [UP]


def test_models_that_are_not_the_same_are_told_apart(tmp_path):
    for name in ("qwen2", "qwen2_tied"):
        write_model(name, tmp_path / name)
    one, other = (read_model_config(tmp_path / name) for name in ("qwen2", "qwen2_tied"))
    assert list(differences_of_arch(one, one)) == []
    assert list(differences_of_arch(one, other)) == ["tied_embeddings is False and True"]
