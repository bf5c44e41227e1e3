"""Each family's table against the files of a tiny transformers model with sizes that are odd."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.megatron.stored_names import local_name
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.families.tables import FAMILIES
from megatron_rl.weights.layouts import MegatronParam, hf_shapes, megatron_params
from megatron_rl.weights.pieces import view

HEADS, GROUPS, HEAD_DIM = 6, 3, 24
SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {
    "n_routed_experts": 10,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 12,
    "n_group": 5,
    "topk_group": 2,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 0,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 6,
    "v_head_dim": 5,
    "head_dim": 6,  # which transformers takes for qk_rope_head_dim
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
# family -> transformers' classes begin with, what differs from SIZES
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"head_dim": 6}),  # it knows hidden / heads only
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [1], "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 0,
        },
    ),
    "phi3": ("Phi3", {"pad_token_id": None}),
    "olmo2": ("Olmo2", {"pad_token_id": None}),
    "olmo3": ("Olmo3", {"pad_token_id": None, "sliding_window": 4}),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "dense", "sparse"],
        },
    ),
    "qwen3_5_text": (
        "Qwen3_5",
        {
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 9,
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 7,
            "linear_conv_kernel_dim": 3,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
        },
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5Moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 14,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 9,
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 7,
            "linear_conv_kernel_dim": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> directory."""
    import transformers

    directories = {}
    for family, (prefix, changes) in MODELS.items():
        text = f"{prefix}TextConfig"
        config_class = text if hasattr(transformers, text) else f"{prefix}Config"
        config = getattr(transformers, config_class)(**{**SIZES, **changes})
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        directories[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(directories[family])
    return directories


def opened(model_dir: Path) -> tuple[ModelArch, dict[str, torch.Tensor]]:
    return read_model_config(model_dir), load_file(model_dir / "model.safetensors")


def built(param: MegatronParam, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The parameter as its pieces tell; NaN where none does."""
    values = torch.full(param.shape, torch.nan, dtype=tensors[param.hf_names[0]].dtype)
    for piece in param.pieces:
        piece.of({param.name: values}).copy_(view(tensors[piece.hf], piece.box))
    return values


def by_formula(param: MegatronParam, tensors: dict[str, torch.Tensor], dim: int) -> torch.Tensor:
    """The parameter by what Megatron-Core says of it, on whole tensors."""
    parts = [tensors[name] for name in param.hf_names]
    if "qkv_proj" in param.hf_names[0]:
        dims = (HEADS * dim, GROUPS * dim, GROUPS * dim)
        parts = list(parts[0].split(dims))
    if param.hf_names[0].endswith("q_proj.weight") and len(parts[0]) == 2 * HEADS * dim:
        query, gate = parts[0].reshape(GROUPS, -1, 2, dim, parts[0].shape[1]).unbind(2)
        key, value = (part.reshape(GROUPS, 1, dim, -1) for part in parts[1:])
        return torch.cat([query, gate, key, value], dim=1).reshape(-1, parts[0].shape[1])
    if len(parts) == 3:  # query, key, value; group by group
        grouped = [part.reshape(GROUPS, -1, dim, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])
    return torch.cat(parts)  # alone, or gate over up


def test_every_family_has_a_model_here():
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("family", MODELS)
def test_the_table_names_the_tensors_of_the_files(models, family):
    arch, tensors = opened(models[family])
    assert hf_shapes(arch) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert arch.num_parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", MODELS)
def test_parameters_are_made_of_whole_tensors_and_back(models, family, dtype):
    arch, tensors = opened(models[family])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    back = {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
    for param in megatron_params(arch):
        values = built(param, tensors)
        assert torch.equal(values, by_formula(param, tensors, arch.head_dim)), param.name
        for piece in param.pieces:
            view(back[piece.hf], piece.box).copy_(piece.of({param.name: values}))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("family", MODELS)
def test_the_list_of_parameters_is_the_model(models, family):
    params = megatron_params(read_model_config(models[family]))
    assert len({param.name for param in params}) == len(params)
    assert (
        sum(prod(param.shape) for param in params)
        == read_model_config(models[family]).num_parameters
    )
    for param in params:
        assert ("{i}" in param.template) == (param.layer is not None)
        assert ("{e}" in param.template) == (param.expert is not None)
        assert param.is_vocabulary == (param.shape[0] == SIZES["vocab_size"])


@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
def test_the_dtype_of_the_files_changes_no_size(models, tmp_path, field):
    config = json.loads((models["qwen3"] / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps({**config, field: "float16"}))
    assert read_model_config(tmp_path) == read_model_config(models["qwen3"])


ATTENTION = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
)
# Layer 1 is dense: only there the norm is one with the linear behind it.
TRANSFORMER_ENGINE = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    *(f"decoder.layers.{layer}.{name}" for layer in range(3) for name in ATTENTION),
    "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.1.mlp.linear_fc1.weight",
    "decoder.layers.1.mlp.linear_fc2.weight",
    *(f"decoder.layers.{layer}.pre_mlp_layernorm.weight" for layer in (0, 2)),
    *(f"decoder.layers.{layer}.mlp.router.weight" for layer in (0, 2)),
    *(
        f"decoder.layers.{layer}.mlp.experts.linear_fc{half}.weight{expert}"
        for layer in (0, 2)
        for half in (1, 2)
        for expert in range(5)
    ),
)


def test_parameters_of_transformer_engine_have_one_local_name_each(models):
    """By reading Megatron-Core 0.16.1: Transformer Engine is not run here."""
    names = [param.name for param in megatron_params(read_model_config(models["qwen3_moe"]))]
    assert sorted(local_name(name) for name in TRANSFORMER_ENGINE) == sorted(names)
    assert [local_name(name) for name in names] == names
