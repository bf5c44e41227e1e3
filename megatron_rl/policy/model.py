"""Build the policy on Megatron-Core: configuration, layer spec, model chunks."""

import dataclasses
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.config import ModelConfig
from megatron_rl.policy.spec import block_spec
from megatron_rl.weights.arch import MixtureArch, ModelArch, padded_vocab_size

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns the final hidden states.

    Megatron-Core 0.16.1 has no output hook. LM head and loss run outside, on the rows that carry
    loss and in chunks, so whole logits never exist.
    """

    def _postprocess(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """[V/tp, H] rows of the LM head on this rank; last stage only."""
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
            return weight
        head: Tensor = self.output_layer.weight
        return head


class ValueModel(HiddenStatesModel):
    """A model with a value head instead of the LM head: V = hidden . weight, on the last stage.

    The head is whole on every tensor-parallel rank and starts at 0, so the first values are 0.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **settings: Any) -> None:
        settings["share_embeddings_and_output_weights"] = False
        super().__init__(config, *args, **settings)
        if self.post_process:
            self.output_layer = torch.nn.Linear(
                config.hidden_size, 1, bias=False, dtype=config.params_dtype
            )
            torch.nn.init.zeros_(self.output_layer.weight)


def _leave(weight: Tensor) -> Tensor:
    return weight


def uses_transformer_engine(model: ModelConfig, device_type: str) -> bool:
    """Whether layers are Transformer Engine's."""
    if model.layer_spec == "auto":
        has = importlib.util.find_spec("transformer_engine") is not None
        return has and device_type == "cuda"
    return model.layer_spec == "transformer_engine"


def transformer_config(
    arch: ModelArch, model: ModelConfig, parallel: ParallelConfig, *, device_type: str
) -> TransformerConfig:
    """Megatron's configuration of this model and layout."""
    dtype = DTYPES[model.dtype]
    use_te = uses_transformer_engine(model, device_type)
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
        "qk_layernorm": arch.qk_norm,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": device_type == "cpu",
        "init_method": _leave,  # every weight is loaded
        "output_layer_init_method": _leave,
        # Loss weights are global, so the schedule and DDP must not divide.
        "calculate_per_token_loss": True,
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1,
        "moe_token_dispatcher_type": "alltoall",  # variable_seq_lengths asks for it, experts or not
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": use_te,
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
    if model.recompute_modules is not None:
        settings["recompute_modules"] = list(model.recompute_modules)
    if vpp is not None:
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    names = {field.name for field in dataclasses.fields(TransformerConfig)}
    settings |= {
        name: value
        for name, value in parallel.model_dump(exclude={"world_size"}).items()
        if name in names
    }
    settings["expert_tensor_parallel_size"] = (
        parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    )
    return TransformerConfig(**{**settings, **model.megatron})


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
        # Megatron-Core multiplies auxiliary losses by the token count and expects a later division,
        # which weights that are global already leave out.
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": use_te,
    }


def build_chunks(
    arch: ModelArch,
    config: TransformerConfig,
    groups: Groups,
    *,
    use_te: bool,
    chunk_class: type[HiddenStatesModel] = HiddenStatesModel,
) -> list[HiddenStatesModel]:
    """This rank's model chunks (one without interleaving), weights not yet loaded."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)  # weights are loaded, dropout is 0
    vpp = groups.layout.vpp
    return [
        _build_chunk(arch, config, groups, chunk if vpp > 1 else None, use_te, chunk_class)
        for chunk in range(vpp)
    ]


def _build_chunk(
    arch: ModelArch,
    config: TransformerConfig,
    groups: Groups,
    chunk: int | None,
    use_te: bool,
    chunk_class: type[HiddenStatesModel],
) -> HiddenStatesModel:
    stage: dict[str, Any] = {} if chunk is None else {"vp_stage": chunk}
    where: dict[str, Any] = {} if chunk is None else {"ignore_virtual": False, **stage}
    model = chunk_class(
        config,
        block_spec(config, use_te=use_te, vp_stage=chunk),
        vocab_size=padded_vocab_size(arch.vocab_size, groups.layout.tp),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        rope_scaling=arch.rope_scaling_factor is not None,
        rope_scaling_factor=arch.rope_scaling_factor or 8.0,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        **stage,
    )
    placed: HiddenStatesModel = model.to(groups.platform.current_device())
    return placed


def in_training_precision(
    config: TransformerConfig, chunks: list[HiddenStatesModel]
) -> list[torch.nn.Module]:
    """Chunks in bfloat16 where asked for."""
    if not config.bf16:
        return list(chunks)
    return [Float16Module(config, chunk) for chunk in chunks]
