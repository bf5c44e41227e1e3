"""Layouts and settings that would be wrong, each with its reason, found before anything is built.

With some of them stock Megatron-Core trains without an error and with wrong gradients; such a one
is refused where the installed version has the fault (faults.py).
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.megatron import faults
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.weights.arch import ModelArch

# Fields that say which network the checkpoint is: with another value Megatron-Core would train
# another network without an error.
NETWORK = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "normalization",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "add_bias_linear",
    "add_qkv_bias",
    "gated_linear_unit",
    "glu_linear_offset",
    "activation_func",
    "activation_func_clamp_value",
    "softmax_scale",
    "softmax_type",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "multi_latent_attention",
    "experimental_attention_variant",
    "window_size",
    "window_attn_skip_freq",
    "rotary_interleaved",
    "no_rope_freq",
    "mrope_section",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_apply_probs_on_input",
    "moe_router_topk",
    "moe_router_topk_limited_devices",
    "moe_router_topk_scaling_factor",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_enable_expert_bias",
    "mtp_num_layers",
    "heterogeneous_block_specs",
    "is_hybrid_model",
)
# weights/layouts gives every stage and chunk the same number of layers.
LAYER_SPLITS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
# Fields that route otherwise than the engine, which runs every expert that the router chose, on
# the very output of the layer before.
ROUTED_OTHERWISE = (
    "moe_router_force_load_balancing",
    "moe_input_jitter_eps",
    "moe_token_dropping",
    "moe_token_drop_policy",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
)
# Fields that are refused while Megatron-Core has the fault.
FAULTY = {
    "perform_initialization": "weights_without_marks",
    "moe_router_load_balancing_type": "auxiliary_losses_times_tokens",
    "moe_aux_loss_coeff": "auxiliary_losses_times_tokens",
    "moe_z_loss_coeff": "auxiliary_losses_times_tokens",
}
# Fields that a recipe may not set, each with the reason.
OWNED = {
    "calculate_per_token_loss": "loss weights are global already, so nothing may divide again",
    "finalize_model_grads_func": "loss weights are global already, so nothing may divide again",
    "use_cpu_initialization": "the device decides it",
    "init_method": "every weight is loaded",
    "output_layer_init_method": "every weight is loaded",
    "variable_seq_lengths": "rows are packed, and their lengths differ",
    **dict.fromkeys(NETWORK, "the model's config.json decides it"),
    **dict.fromkeys(ROUTED_OTHERWISE, "the trainer must route tokens as the engine does"),
    "moe_grouped_gemm": "model.layer_spec decides it",
    "moe_use_legacy_grouped_gemm": "model.layer_spec decides it",
    **dict.fromkeys(LAYER_SPLITS, "layers are split evenly over pipeline stages"),
    "params_dtype": "model.dtype decides it",
    "pipeline_dtype": "model.dtype decides it",
    "bf16": "model.dtype decides it",
    "fp16": "model.dtype decides it",
    "recompute_granularity": "it is model.recompute_granularity",
    "recompute_method": "it is model.recompute_method",
    "recompute_num_layers": "it is model.recompute_num_layers",
    "recompute_modules": "it is model.recompute_modules",
    **{name: f"it is parallel.{name}" for name in ParallelConfig.model_fields},
}
DROPOUTS = ("hidden_dropout", "attention_dropout")


def config_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Problems of a layout, whatever the model."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, etp = parallel.virtual_pipeline_model_parallel_size, parallel.expert_tensor_parallel_size
    for name in ("tensor", "pipeline", "expert"):
        field = f"{name}_model_parallel_size"
        if getattr(parallel, field) < 1:
            yield ConfigError(
                f"parallel.{field}", getattr(parallel, field), "must be at least 1", "Set 1"
            )
    if parallel.context_parallel_size != 1:
        yield ConfigError(
            "parallel.context_parallel_size",
            parallel.context_parallel_size,
            "not available yet",
            "Set it to 1",
        )
    is_uneven = etp is not None and etp != tp and parallel.expert_model_parallel_size == 1
    if is_uneven and (reason := faults.reason("experts_of_smaller_tensor_parallelism")):
        yield ConfigError(
            "parallel.expert_tensor_parallel_size",
            etp,
            f"must equal tensor_model_parallel_size={tp} while expert_model_parallel_size is 1: "
            f"{reason}",
            "Leave it out",
        )
    if parallel.sequence_parallel and tp == 1:
        yield ConfigError(
            "parallel.sequence_parallel",
            True,
            "has no effect at tensor_model_parallel_size=1",
            "Leave it out, or use tensor parallelism",
        )
    if vpp is not None:
        yield from _interleaving_problems(model, pp, vpp)
    yield from _override_problems(model.megatron)


def _interleaving_problems(model: ModelConfig, pp: int, vpp: int) -> Iterator[ConfigError]:
    field = "parallel.virtual_pipeline_model_parallel_size"
    if pp == 1 or vpp < 2:
        yield ConfigError(
            field, vpp, f"has no effect at pipeline_model_parallel_size={pp}", "Leave it out"
        )
    is_crossed = pp == 2 and model.megatron.get("overlap_p2p_comm") is False
    if is_crossed and (reason := faults.reason("interleaving_without_overlap")):
        yield ConfigError(
            "model.megatron.overlap_p2p_comm",
            False,
            reason,
            "Leave it out (it is then true), or drop virtual_pipeline_model_parallel_size",
        )


def _override_problems(overrides: Mapping[str, Any]) -> Iterator[ConfigError]:
    if not overrides:
        return
    from megatron_rl.megatron.enter import config_fields  # it imports torch and Megatron-Core

    known = config_fields()
    for name, value in overrides.items():
        field = f"model.megatron.{name}"
        why_not = OWNED.get(name) or (faults.reason(FAULTY[name]) if name in FAULTY else None)
        if why_not:
            yield ConfigError(field, value, f"cannot be set here: {why_not}", "Leave it out")
        elif name in DROPOUTS and value:
            yield ConfigError(
                field,
                value,
                "the engine samples without dropout, so the trainer must score without it",
                "Set 0.0",
            )
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "See Megatron-Core's TransformerConfig"
            yield ConfigError(field, value, "TransformerConfig has no such field", hint)


def optimizer_problems(
    dtype: str, section: str, optimizer: OptimizerConfig
) -> Iterator[ConfigError]:
    """Problems of the settings of one optimizer."""
    is_clipped = dtype == "float64" and optimizer.clip_grad > 0
    if is_clipped and (reason := faults.reason("clipping_in_float64")):
        yield ConfigError(
            f"{section}.clip_grad",
            optimizer.clip_grad,
            f"{reason}, and model.dtype is float64",
            "Set 0 (float64 is for verification)",
        )
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError(
            "optimizer.min_lr",
            optimizer.min_lr,
            f"must not exceed {section}.lr={optimizer.lr}",
            "Lower it",
        )


def model_problems(arch: ModelArch, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Problems of a layout for this model."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    chunks = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    groups = arch.num_query_groups
    field = "parallel.tensor_model_parallel_size"
    for what, count in (
        ("attention heads", arch.num_attention_heads),
        *arch.dense_rows,
    ):
        if count % tp:
            yield ConfigError(
                field, tp, f"must divide the model's {count} {what}", "Choose a divisor"
            )
    if groups % tp and tp % groups:
        yield ConfigError(
            field,
            tp,
            f"must divide the model's {groups} key/value heads or be a multiple of them",
            "Choose such a size",
        )
    if arch.num_layers % chunks:
        yield ConfigError(
            "parallel.pipeline_model_parallel_size",
            pp,
            f"must divide the model's {arch.num_layers} layers (with "
            f"{chunks // pp} chunks a rank: {chunks})",
            "Choose a divisor",
        )
    yield from _expert_problems(arch, parallel)


def _expert_problems(arch: ModelArch, parallel: ParallelConfig) -> Iterator[ConfigError]:
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    field = "parallel.expert_model_parallel_size"
    if arch.mixture is None:
        if ep > 1:
            yield ConfigError(field, ep, "has no effect: the model has no experts", "Leave it out")
        return
    if arch.mixture.num_experts % ep:
        yield ConfigError(
            field,
            ep,
            f"must divide the model's {arch.mixture.num_experts} experts",
            "Choose a divisor",
        )
    etp = parallel.expert_tensor_parallel_size or tp
    for what, count in arch.expert_rows:
        if count % etp:
            yield ConfigError(
                "parallel.expert_tensor_parallel_size",
                etp,
                f"must divide the model's {count} {what}",
                "Choose a divisor",
            )
    is_whole = tp > 1 and not parallel.sequence_parallel
    if is_whole and (reason := faults.reason("experts_without_sequence_parallelism")):
        yield ConfigError("parallel.sequence_parallel", False, reason, "Set it to true")
