"""Random models that both sides of the weight bridge can run, with the quickstart's tokenizer."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from tiny_models import (
    DELTA,
    DELTAS,
    EIGHT_EXPERTS,
    GLM4,
    GLM4_LITE,
    LATENT,
    LLAMA3_ROPE,
    MOONLIGHT,
    NETS_OF_EXPERTS,
    OLMO,
    PHI,
    PHI_MINI,
    STACKED,
    SWITCHED_ON,
    WINDOWS,
    YARN_ROPE,
    with_long_memory,
)

CACHE_MIB = 64  # of an engine
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.07,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "dtype": "float32",
}
# On a CPU vLLM has latent attention of these two sizes alone, which published models have.
LATENT_OF_ENGINE: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": 48,
}
# Heads of 32, of which 24 turn.
PHI_MINI_OF_ENGINE: dict[str, Any] = {
    **PHI_MINI,
    "rope_parameters": {
        **PHI_MINI["rope_parameters"],
        "short_factor": [1.0 + 0.2 * pair for pair in range(12)],
        "long_factor": [1.0 + 2.0 * pair for pair in range(12)],
    },
}
# Model -> transformers' classes begin with, what differs from SIZES. vLLM's CPU attention knows
# heads of 32, 64, ... but not of 64 / 4.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    # One key head over two ranks: the engine replicates it, Megatron cuts it.
    "llama": ("Llama", {"hidden_size": 64, "num_key_value_heads": 1, "head_dim": 32}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"hidden_size": 64, "head_dim": 32, "sliding_window": None}),
    "qwen3": ("Qwen3", {"hidden_size": 64, "head_dim": 32}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EIGHT_EXPERTS, "head_dim": 64, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "glm4_moe": ("Glm4Moe", {**GLM4, "head_dim": 32}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, **LATENT_OF_ENGINE}),
    "moonlight": ("DeepseekV3", {**MOONLIGHT, **LATENT_OF_ENGINE, "q_lora_rank": None}),
    "glm4_moe_lite": ("Glm4MoeLite", {**GLM4_LITE, **LATENT_OF_ENGINE, "v_head_dim": 96}),
    "phi4": ("Phi3", {**PHI, "hidden_size": 64, "num_key_value_heads": 1, "head_dim": 32}),
    "phi4_mini": ("Phi3", PHI_MINI_OF_ENGINE),
    "olmo2": ("Olmo2", OLMO),
    "olmo3": ("Olmo3", WINDOWS),
    "mistral_window": ("Mistral", {"sliding_window": 8, "head_dim": 64}),
    "qwen2_window": ("Qwen2", SWITCHED_ON),
    "qwen3_window": ("Qwen3", {**SWITCHED_ON, "head_dim": 64}),
    "phi3_window": ("Phi3", {**PHI, "sliding_window": 9}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
if DELTAS:  # which vLLM does not have on a CPU
    MODELS["qwen3_5"] = ("Qwen3_5", {**DELTA, "tie_word_embeddings": True})
    MODELS["qwen3_5_moe"] = ("Qwen3_5Moe", NETS_OF_EXPERTS)


def write_model(name: str, model_dir: Path) -> None:
    """Random weights of spread-out sizes, with the quickstart's tokenizer."""
    import transformers

    spec = importlib.util.spec_from_file_location("make_model", QUICKSTART / "make_model.py")
    make_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_model)
    make_model.make_model(model_dir, QUICKSTART / "data" / "train.jsonl")
    torch.manual_seed(len(name))
    family, changes = MODELS[name]
    settings = copy.deepcopy({**SIZES, "vocab_size": make_model.VOCAB_SIZE, **changes})
    of_text = "Text" if family.startswith("Qwen3_5") else ""
    config = getattr(transformers, f"{family}{of_text}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        with_long_memory(model)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(0.3 * torch.randn_like(bias))
    model.save_pretrained(model_dir, save_original_format=family not in STACKED)
