"""Random models that both sides of the weight bridge can run, with the quickstart's tokenizer."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2_tied": {"hidden_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": True},
    # One key head over two ranks: the engine replicates it, Megatron cuts it.
    "llama": {"hidden_size": 64, "num_key_value_heads": 1, "tie_word_embeddings": False},
}


def write_model(name: str, model_dir: Path) -> None:
    """Random weights of spread-out sizes, with the quickstart's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    spec = importlib.util.spec_from_file_location("make_model", QUICKSTART / "make_model.py")
    make_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_model)
    make_model.make_model(model_dir, QUICKSTART / "data" / "train.jsonl")
    torch.manual_seed(len(name))
    settings = {
        "vocab_size": make_model.VOCAB_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.07,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "eos_token_id": 1,
        "dtype": "float32",
        **MODELS[name],
    }
    if name == "llama":  # vLLM's CPU attention knows 32, 64, ... but not 64 / 4
        model: Any = LlamaForCausalLM(LlamaConfig(**settings, head_dim=32, rms_norm_eps=1e-5))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**settings, rms_norm_eps=1e-6))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(model_dir)
