"""The text of a model that also reads images, as transformers writes one."""

import json
import shutil

import pytest
import torch
from conversion_models import COMPANIONS, Told, are_equal, read_tensors, with_stacks
from safetensors.torch import load_file

from megatron_rl.conversion.to_text import convert_to_text, text_config
from megatron_rl.errors import InputError
from megatron_rl.weights.families.registry import read_model_config

TEXT = {
    "vocab_size": 70,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 16,
    "patch_size": 4,
}


EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
}
# Class of transformers -> what its text has, whether the head is tied, experts one by one.
KINDS = {
    "a head": ("Qwen3_5", {}, False, True),
    "tied": ("Qwen3_5", {}, True, True),
    "experts in stacks": ("Qwen3_5Moe", EXPERTS, False, False),
    "experts one by one": ("Qwen3_5Moe", EXPERTS, False, True),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def models(request, tmp_path_factory):
    """(the model of transformers, its directory, that of its text)."""
    import transformers

    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    family, changes, is_tied, are_alone = request.param
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, **changes, "tie_word_embeddings": is_tied},
        vision_config=VISION,
        tie_word_embeddings=is_tied,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    model.save_pretrained(folder / "images", save_original_format=are_alone)
    for name, content in COMPANIONS.items():
        (folder / "images" / name).write_bytes(content)
    convert_to_text(folder / "images", folder / "text", file_bytes=9000, progress=Told())
    return model, folder / "images", folder / "text"


def test_the_tensors_are_those_of_the_text_bit_for_bit(models):
    _, images, text = models
    source = load_file(images / "model.safetensors")
    assert any(name.startswith("model.visual.") for name in source)
    assert len(list(text.glob("*.safetensors"))) > 3
    expected = {
        name.replace("language_model.", ""): tensor
        for name, tensor in source.items()
        if "visual" not in name
    }
    if "model.layers.0.mlp.experts.0.gate_proj.weight" in expected:
        expected = with_stacks(expected)
    assert are_equal(read_tensors(text), expected)


def test_transformers_computes_the_same_with_the_text_alone(models):
    from transformers import AutoModelForCausalLM

    model, images, text = models
    alone = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    assert type(alone).__name__ == type(model).__name__.replace("ConditionalGeneration", "CausalLM")
    tokens = torch.arange(2, 32)[None]
    with torch.no_grad():
        assert torch.equal(alone(tokens).logits, model(tokens).logits)
    for name, content in COMPANIONS.items():
        assert (text / name).read_bytes() == content
    assert read_model_config(text).delta is not None
    with pytest.raises(InputError, match="megatron-rl convert to-text --hf DIR --output DIR"):
        read_model_config(images)


def test_what_guesses_ahead_is_left_out_and_what_is_not_known_is_not(models, tmp_path):
    from safetensors.torch import save_file

    _, images, _ = models
    for name, is_known in (("mtp.fc.weight", True), ("model.audio.weight", False)):
        folder = tmp_path / name
        shutil.copytree(images, folder)
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: torch.ones(2)}, folder / "model.safetensors")
        output = tmp_path / f"text of {name}"
        if is_known:
            convert_to_text(folder, output, file_bytes=1 << 20, progress=Told())
            assert name not in load_file(output / "model.safetensors")
            continue
        with pytest.raises(InputError, match=r"1 not known \['model.audio.weight'\]"):
            convert_to_text(folder, output, file_bytes=1 << 20, progress=Told())
        assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3"}, "it has no text of its own to take out. Use it as it is"),
        ({"text_config": None}, "it has no text of its own to take out"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type='llama' must be"),
        (
            {"text_config": {"tie_word_embeddings": True}},
            "tie_word_embeddings is False, and True in text_config",
        ),
    ],
)
def test_what_has_no_text_of_its_own_is_refused(changes, message):
    config = {"model_type": "qwen3_5", "tie_word_embeddings": False, "text_config": TEXT}
    with pytest.raises(InputError) as refused:
        text_config({**json.loads(json.dumps(config)), **changes}, "here")
    assert message in str(refused.value)
