"""Megatron-Core's configuration of a model at a layout."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from megatron_rl.megatron.auxiliary import FIELDS
from megatron_rl.megatron.config import ModelConfig
from megatron_rl.megatron.enter import config_fields
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.weights.arch import (
    DeltaArch,
    LatentArch,
    MixtureArch,
    ModelArch,
    SlidingArch,
    YarnRope,
)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def _leave(weight: Tensor) -> Tensor:
    return weight


def transformer_config(
    arch: ModelArch, model: ModelConfig, parallel: ParallelConfig, *, device_type: str
) -> TransformerConfig:
    """Megatron's configuration of this model and layout."""
    dtype = DTYPES[model.dtype]
    use_te = model.uses_transformer_engine(device_type)
    vpp = parallel.virtual_pipeline_model_parallel_size
    settings: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "layernorm_epsilon": arch.rms_norm_eps,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm or arch.latent is not None,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu_initialization": device_type == "cpu",
        "init_method": _leave,  # every weight is loaded
        "output_layer_init_method": _leave,
        # Loss weights are global, so the schedule and DDP must not divide.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,  # rows differ
        "moe_token_dispatcher_type": "alltoall",  # variable_seq_lengths asks for it, experts or not
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": use_te or device_type == "cpu",  # on_cpu.py has one for it
        "bias_dropout_fusion": use_te,
        "apply_rope_fusion": use_te,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "recompute_granularity": model.recompute_granularity,
        "recompute_method": model.recompute_method,
        "recompute_num_layers": model.recompute_num_layers,
    }
    if arch.mixture is not None:
        settings |= _mixture_settings(arch.mixture, arch.num_layers, use_te=use_te)
        if arch.mixture.score == "sigmoid":
            settings |= _sigmoid_settings(arch.mixture, dtype)
    if arch.delta is not None:
        settings |= _delta_settings(arch.delta, arch.num_layers)
    if arch.sliding is not None:
        settings |= _sliding_settings(arch.sliding, arch.num_layers)
    if model.recompute_modules is not None:
        settings["recompute_modules"] = list(model.recompute_modules)
    if vpp is not None:  # see faults.py, interleaving_without_overlap
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    names = config_fields()
    settings |= {
        name: value
        for name, value in parallel.model_dump(exclude={"world_size"}).items()
        if name in names
    }
    settings["expert_tensor_parallel_size"] = (
        parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    )
    if vpp is not None and parallel.pipeline_model_parallel_size == 2 and parallel.split.first:
        settings["num_layers_in_last_pipeline_stage"] = None  # see faults.py, interleaving_of_ends
    settings |= _overrides(model)
    if arch.latent is None:
        return TransformerConfig(**settings)
    return MLATransformerConfig(**settings, **_latent_settings(arch.latent, arch.yarn))


def _overrides(model: ModelConfig) -> dict[str, Any]:
    """What the recipe sets by model.megatron; names of an enumeration as its members."""
    backend = model.megatron.get("attention_backend")
    named = {} if backend is None else {"attention_backend": AttnBackend[backend]}
    own = {name: value for name, value in model.megatron.items() if name not in FIELDS}
    return {**own, **named}


def _mixture_settings(mixture: MixtureArch, num_layers: int, *, use_te: bool) -> dict[str, Any]:
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_ffn_hidden_size": mixture.ffn_hidden_size,
        # A list, even of ones, puts layer numbers into the names of a checkpoint.
        "moe_layer_freq": [int(layer not in mixture.dense_layers) for layer in range(num_layers)]
        if mixture.dense_layers
        else 1,
        "moe_router_topk": mixture.top_k,
        # A softmax over the chosen experts is one over all of them, scaled so that theirs sum to 1.
        "moe_router_pre_softmax": not mixture.renormalized,
        # See routers.py, which balances.
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": use_te,
        "moe_shared_expert_intermediate_size": mixture.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": mixture.has_shared_gate,
    }


def _sigmoid_settings(mixture: MixtureArch, dtype: torch.dtype) -> dict[str, Any]:
    """What DeepSeek-V3's router has besides."""
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": mixture.has_bias,
        "moe_router_bias_update_rate": 0.0,  # see routers.py, which moves it
        "moe_router_topk_scaling_factor": mixture.scale,
        # transformers and vLLM compute these logits in float32 whatever the model's dtype.
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
        "moe_router_num_groups": mixture.num_groups if mixture.num_groups > 1 else None,
        "moe_router_group_topk": mixture.chosen_groups if mixture.num_groups > 1 else None,
    }


def _delta_settings(delta: DeltaArch, num_layers: int) -> dict[str, Any]:
    """spec.py puts the nets in: with experimental_attention_variant local layers have no spec."""
    return {
        "linear_attention_freq": [
            int(layer not in delta.attention_layers) for layer in range(num_layers)
        ],
        "linear_conv_kernel_dim": delta.kernel,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_num_key_heads": delta.num_key_heads,
        "linear_num_value_heads": delta.num_value_heads,
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
    }


def _sliding_settings(sliding: SlidingArch, num_layers: int) -> dict[str, Any]:
    """Megatron-Core's window counts the tokens before a token, without itself."""
    return {
        "window_size": (sliding.window - 1, 0),
        "window_attn_skip_freq": [int(layer in sliding.layers) for layer in range(num_layers)],
    }


def _latent_settings(latent: LatentArch, yarn: YarnRope | None) -> dict[str, Any]:
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.rank,
        "qk_head_dim": latent.still_dim,
        "qk_pos_emb_head_dim": latent.turning_dim,
        "v_head_dim": latent.value_dim,
        "rope_type": "rope",  # rope.py turns, by YaRN's angles where a model has them
        # With these two it scales scores, whatever turns.
        "rotary_scaling_factor": 1.0 if yarn is None else yarn.factor,
        "mscale_all_dim": 0.0 if yarn is None else yarn.score_mscale,
    }
