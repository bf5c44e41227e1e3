"""Attention of packed rows: by formula, for every kind, and which kind a model has."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from megatron_rl.megatron.config import ModelConfig
from megatron_rl.platforms.versions import torch_version

BOUND = 1e-6  # our angles are float32, as in transformers


@pytest.fixture(scope="module")
def told():
    """In a fresh process: here Megatron-Core must not be imported before it is prepared."""
    script = Path(__file__).parent / "attention_alone.py"
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["flash", "blocks"])
def test_each_kind_is_softmax_of_every_sequence_alone(told, kind):
    errors = {name: error for name, error in told["errors"].items() if name.startswith(kind)}
    assert len(errors) == 5
    assert all(error < BOUND for error in errors.values()), errors


@pytest.mark.parametrize("kind", ["flash", "blocks"])
def test_values_may_be_narrower_than_keys(told, kind):
    assert told["latent"][kind] < 1e-12


def test_flash_attention_keeps_what_is_counted_and_not_the_product(told):
    kept, counted = told["kept"]
    assert kept == counted


@pytest.mark.parametrize("kind", ["flash", "blocks"])
def test_sequences_that_ranks_share_have_the_attention_of_whole_ones(told, kind):
    errors = {n: error for n, error in told["errors"].items() if n.startswith(f"split {kind}")}
    assert len(errors) == 3
    assert all(error < BOUND for error in errors.values()), errors


@pytest.mark.parametrize("kind", ["flash", "blocks"])
def test_responses_behind_one_prompt_have_the_attention_of_whole_sequences(told, kind):
    errors = {n: error for n, error in told["errors"].items() if n.startswith(f"shared {kind}")}
    assert len(errors) == 2
    assert all(error < BOUND for error in errors.values()), errors


@pytest.mark.parametrize("kind", ["flash", "blocks"])
def test_a_window_hides_all_but_the_newest_tokens(told, kind):
    """In whole rows, where ranks share a row, and behind prompts that responses share."""
    errors = {n: error for n, error in told["errors"].items() if n.startswith(f"windows of {kind}")}
    assert len(errors) == 11
    assert all(error < BOUND for error in errors.values()), errors


def test_the_next_tokens_see_what_their_layer_s_window_shows(told):
    yes, no = True, False
    first, whole = [yes, no, no, no, no], [yes] * 5
    assert told["next"] == {
        "None": [first, whole],
        "3": [first, [no, no, yes, yes, yes]],
        "8": [first, whole],
    }


def test_keys_that_are_picked_for_every_response_are_not_kept_for_the_backward(told):
    assert told["shared"] == 0


def test_keys_of_other_ranks_are_not_kept_for_the_backward(told):
    """They come again, and nothing of them is left after it."""
    assert told["split"] == 0


def test_transformer_engine_takes_a_row_as_it_is(told):
    assert told["te"]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "torch", "kind"),
    [
        ("cuda", "bfloat16", 128, "2.13.0+cu130", "flash"),
        ("cuda", "bfloat16", 256, "2.12.1", "flash"),
        ("cuda", "bfloat16", 128, "2.11.0", "blocks"),
        ("cuda", "bfloat16", 320, "2.13.0", "blocks"),
        ("cuda", "bfloat16", 100, "2.13.0", "blocks"),
        ("cuda", "float32", 128, "2.13.0", "blocks"),
        ("cpu", "bfloat16", 128, "2.13.0", "blocks"),
    ],
)
def test_the_kind_is_chosen_once_from_device_dtype_and_head(device, dtype, head_dim, torch, kind):
    model = ModelConfig(path="any", dtype=dtype, layer_spec="local")
    with mock.patch("importlib.metadata.version", return_value=torch):
        torch_version.cache_clear()
        assert model.attention(device, head_dim) == kind
    torch_version.cache_clear()


def test_transformer_engine_has_its_own():
    model = ModelConfig(path="any", layer_spec="transformer_engine")
    assert model.attention("cuda", 128) == "transformer_engine"
