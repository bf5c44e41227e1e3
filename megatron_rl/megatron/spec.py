"""The modules that a layer of the policy is built from."""

import copy
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rl.megatron.attention import ATTENTIONS, PackedAttention
from megatron_rl.megatron.config import Attention
from megatron_rl.megatron.latent_attention import LatentAttention
from megatron_rl.megatron.layers import (
    CentredNorm,
    GatedAttention,
    KeyNorm,
    Norm,
    NormedRowParallelLinear,
    QueryNorm,
)
from megatron_rl.megatron.stored_names import DELTA_NORM, LATENT_NORMS, MLP_NORM
from megatron_rl.weights.arch import ModelArch


def block_spec(
    arch: ModelArch, config: TransformerConfig, *, attention: Attention, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one model chunk of this rank: Transformer Engine's, or local ones.

    Megatron-Core picks dense and mixture layers by config.moe_layer_freq.
    """
    use_te = attention == "transformer_engine"
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    if not use_te:
        spec.layer_norm = norm_of(config)
        for layer in spec.layer_specs:
            _make_local(layer, config, ATTENTIONS[attention])
            if arch.norms_behind:
                _put_norms_behind(layer)
    if config.linear_attention_freq is not None:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage)
        spec.layer_specs = [
            _with_delta_net(layer) if config.linear_attention_freq[number] else layer
            for number, layer in enumerate(spec.layer_specs, first)
        ]
    return spec


def norm_of(config: TransformerConfig) -> type[Norm]:
    """The norm of hidden states and of heads."""
    return CentredNorm if config.layernorm_zero_centered_gamma else Norm


def _with_delta_net(layer: Any) -> Any:
    """The layer with a gated delta net in the place of attention."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules

    from megatron_rl.megatron.delta_net import DeltaNet  # not every version has what it builds on

    net = copy.copy(layer)
    parts = net.submodules = copy.copy(layer.submodules)
    attention = layer.submodules.self_attention.submodules
    parts.self_attention = ModuleSpec(
        module=DeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=attention.linear_qkv, out_norm=Norm, out_proj=attention.linear_proj
        ),
    )
    keys = layer.submodules.sharded_state_dict_keys_map
    parts.sharded_state_dict_keys_map = {**keys, DELTA_NORM[0]: DELTA_NORM[1]}
    return net


def _make_local(
    layer: Any, config: TransformerConfig, core_attention: type[PackedAttention]
) -> None:
    """Put our norm and attention into a stock layer; layers of one kind share their spec."""
    parts = layer.submodules
    norm = norm_of(config)
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = core_attention
    if config.multi_latent_attention:
        parts.self_attention.module = LatentAttention
        attention.q_layernorm = attention.kv_layernorm = Norm
        # Transformer Engine fuses norms with what follows, but for the one before attention.
        parts.sharded_state_dict_keys_map = dict(LATENT_NORMS)
        if not _is_mixture(parts.mlp):
            parts.sharded_state_dict_keys_map[MLP_NORM[0]] = MLP_NORM[1]
        return
    if config.attention_output_gate:
        parts.self_attention.module = GatedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    if _is_mixture(parts.mlp):
        # Transformer Engine keeps this norm apart from the experts, and so do its checkpoints:
        # under the stock map, one of local layers would not load there.
        parts.sharded_state_dict_keys_map = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_"
        }


def _put_norms_behind(layer: Any) -> None:
    """Norm what attention and feed-forward network give, not what they take; OLMo 2's norms."""
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    attention = parts.self_attention.submodules
    attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    mlp = parts.mlp
    own = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    attention.linear_proj = own.linear_fc2 = NormedRowParallelLinear


def _is_mixture(mlp: ModuleSpec | functools.partial[Any]) -> bool:
    """True where a layer's MLP is a mixture of experts.

    Older versions say what they build by a ModuleSpec, newer ones by a partial call.
    """
    built = mlp.func if isinstance(mlp, functools.partial) else mlp.module
    return built is MoELayer
