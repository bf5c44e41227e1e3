"""The config.json of real models, as they are published: taken with their size, or refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_rl.errors import InputError
from megatron_rl.weights.families.registry import read_model_config

ROWS = yaml.safe_load(
    (Path(__file__).parents[2] / "data" / "published_configs.yaml").read_text(encoding="utf-8")
)


@pytest.fixture
def directory_of(tmp_path):
    def write(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_a_published_config(directory_of, row):
    directory = directory_of(row["config"])
    if "refused" in row:
        with pytest.raises(InputError) as refused:
            read_model_config(directory)
        assert row["refused"] in str(refused.value)
        return
    assert read_model_config(directory).num_parameters == num_parameters_by_transformers(directory)


def num_parameters_by_transformers(directory):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    weights = sum(weight.numel() for weight in model.parameters())  # a tied head counts once
    biases = (b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    return weights + sum(bias.numel() for bias in biases)


def test_all_that_is_not_known_is_named_at_once_with_a_way_out(directory_of):
    config = next(row["config"] for row in ROWS if row["name"] == "Qwen3-8B")
    directory = directory_of(config | {"logit_scale": 2.0, "my_tool": "1.0", "hidden_act": "gelu"})
    with pytest.raises(InputError) as refused:
        read_model_config(directory)
    message = str(refused.value)
    for name in ("logit_scale=2.0", "my_tool='1.0'", "hidden_act='gelu'"):
        assert message.count(name) == 1
    assert "set model.ignore_config_fields=[logit_scale,my_tool] and they pass" in message


def test_a_field_that_a_person_answers_for_passes(directory_of):
    config = next(row["config"] for row in ROWS if row["name"] == "Qwen3-8B")
    directory = directory_of(config | {"my_tool": "1.0"})
    assert read_model_config(directory, ["my_tool"]) == read_model_config(directory_of(config))


@pytest.mark.parametrize("name", ["hidden_act", "rope_theta", "sliding_window", "qkv_bias"])
def test_a_field_that_is_known_is_never_ignored(directory_of, name):
    config = next(row["config"] for row in ROWS if row["name"] == "Mistral-7B-v0.1")
    with pytest.raises(InputError, match=f"{name} cannot be ignored: the field is known"):
        read_model_config(directory_of(config), [name])
