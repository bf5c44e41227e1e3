"""Architectures small enough to count rows by hand, and their tensors, all entries different."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.weights.arch import (
    DeltaArch,
    LatentArch,
    MixtureArch,
    ModelArch,
    SlidingArch,
)
from megatron_rl.weights.layouts import hf_shapes

# 4 query heads of 2 rows in 2 groups: q has 8 rows, k and v have 4 each.
QWEN2 = ModelArch(
    model_type="qwen2",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=2,
    vocab_size=90,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling_factor=None,
    max_position_embeddings=64,
    qkv_bias=True,
    tied_embeddings=False,
)
LLAMA = replace(QWEN2, model_type="llama", qkv_bias=False)
QWEN3 = replace(LLAMA, model_type="qwen3", qk_norm=True, head_dim=6)
FOUR_EXPERTS = MixtureArch(num_experts=4, ffn_hidden_size=4, top_k=2, renormalized=True)
ARCHS = {
    "qwen2": QWEN2,
    "qwen2_tied": replace(QWEN2, tied_embeddings=True),
    "llama": LLAMA,
    "llama_tied": replace(LLAMA, tied_embeddings=True),
    "mistral": replace(LLAMA, model_type="mistral", head_dim=6),
    "qwen3": QWEN3,
    "qwen3_moe": replace(
        QWEN3,
        model_type="qwen3_moe",
        mixture=replace(FOUR_EXPERTS, dense_layers=frozenset({0, 2})),
        tied_embeddings=True,
    ),
    "mixtral": replace(LLAMA, model_type="mixtral", mixture=FOUR_EXPERTS),
    "glm4_moe": replace(
        QWEN3,
        model_type="glm4_moe",
        qkv_bias=True,
        rotary_dim=2,
        layers_behind=1,
        mixture=replace(
            FOUR_EXPERTS,
            dense_layers=frozenset({0}),
            score="sigmoid",
            has_bias=True,
            scale=2.5,
            shared_ffn_hidden_size=8,
        ),
    ),
}
# 4 heads: queries have 4 + 2 entries each, values 3; both latent vectors are cut by 2 ranks.
LATENT = replace(
    ARCHS["glm4_moe"],
    model_type="deepseek_v3",
    qkv_bias=False,
    qk_norm=False,
    num_query_groups=4,
    head_dim=6,
    latent=LatentArch(
        rank=10, query_rank=8, still_dim=4, turning_dim=2, value_dim=3, interleaved=True
    ),
)
ARCHS |= {
    "deepseek_v3": LATENT,
    "glm4_moe_lite": replace(
        LATENT, model_type="glm4_moe_lite", latent=replace(LATENT.latent, query_rank=None)
    ),
}
ARCHS |= {
    "phi3": replace(LLAMA, model_type="phi3"),
    "olmo2": replace(LLAMA, model_type="olmo2", qk_norm=True, wide_qk_norm=True, norms_behind=True),
    "phi3_tied": replace(LLAMA, model_type="phi3", tied_embeddings=True, head_dim=6),
}
# 4 heads of queries and gates in 2 groups; 4 heads of keys, 8 of values in the net of layer 1.
ARCHS["qwen3_5"] = replace(
    QWEN3,
    model_type="qwen3_5_text",
    rotary_dim=2,
    tied_embeddings=True,
    delta=DeltaArch(
        attention_layers=frozenset({0, 2, 3}),
        num_key_heads=4,
        num_value_heads=8,
        key_dim=3,
        value_dim=5,
        kernel=4,
    ),
)
ARCHS["olmo3"] = replace(
    ARCHS["olmo2"],
    model_type="olmo3",
    sliding=SlidingArch(window=4, layers=frozenset({0, 1, 3}), rope_theta=1e4),
)
# A mixture in each layer, and an expert of 8 rows that every token meets behind a gate.
ARCHS["qwen3_5_moe"] = replace(
    ARCHS["qwen3_5"],
    model_type="qwen3_5_moe_text",
    tied_embeddings=False,
    mixture=replace(FOUR_EXPERTS, shared_ffn_hidden_size=8, has_shared_gate=True),
)
# What two does not divide: three key heads, and a vocabulary that padding makes 192 of.
ODD = replace(QWEN2, num_attention_heads=6, num_query_groups=3, vocab_size=151)
EIGHT_HEADS = replace(QWEN2, num_attention_heads=8, ffn_hidden_size=16, vocab_size=151)


def hf_tensors(arch: ModelArch, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in hf_shapes(arch).items()
    }


def write_checkpoint(directory: Path, tensors: dict[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    return directory
