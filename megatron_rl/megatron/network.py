"""The network of a rank: model chunks that end in hidden states, and the head behind them."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_rl.megatron.config import Attention
from megatron_rl.megatron.routers import biases_kept
from megatron_rl.megatron.spec import block_spec
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.arch import ModelArch, padded_vocab_size


class HiddenStatesModel(GPTModel):
    """A GPTModel whose last stage returns the final hidden states.

    LM head and loss run outside, on the rows that carry loss and in chunks, so whole logits never
    exist. Not every version has a hook there (faults.py, no_output_hook), and the model that
    follows this one has none, so this method serves all.
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

    def head_input(self, hidden: Tensor) -> Tensor:
        """[T, 1, H] final hidden states as the LM head takes them: whole rows on every rank.

        Under sequence parallelism hidden is [T/tp, 1, H]. Each tensor-parallel rank has a part of
        the head, so backward sums their gradients.
        """
        if self.config.sequence_parallel:
            whole: Tensor = gather_from_sequence_parallel_region(hidden)
            return whole
        copied: Tensor = copy_to_tensor_model_parallel_region(hidden)
        return copied


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

    def head_input(self, hidden: Tensor) -> Tensor:
        """[T, 1, H] final hidden states as the value head takes them: whole rows on every rank.

        Every tensor-parallel rank computes all values, so the gradient that comes back is whole on
        every rank: nothing sums it over them.
        """
        if not self.config.sequence_parallel:
            return hidden
        whole: Tensor = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False
        )
        return whole


def build_chunks(
    arch: ModelArch,
    config: TransformerConfig,
    groups: Groups,
    *,
    attention: Attention,
    chunk_class: type[HiddenStatesModel] = HiddenStatesModel,
) -> list[HiddenStatesModel]:
    """This rank's model chunks (one without interleaving), weights not yet loaded."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)  # weights are loaded, dropout is 0
    vpp = groups.layout.vpp
    return [
        _build_chunk(arch, config, groups, chunk if vpp > 1 else None, attention, chunk_class)
        for chunk in range(vpp)
    ]


def _build_chunk(
    arch: ModelArch,
    config: TransformerConfig,
    groups: Groups,
    chunk: int | None,
    attention: Attention,
    chunk_class: type[HiddenStatesModel],
) -> HiddenStatesModel:
    stage: dict[str, Any] = {} if chunk is None else {"vp_stage": chunk}
    use_te = attention == "transformer_engine"
    where: dict[str, Any] = {} if chunk is None else {"ignore_virtual": False, **stage}
    model = chunk_class(
        config,
        block_spec(arch, config, attention=attention, vp_stage=chunk),
        vocab_size=padded_vocab_size(arch.vocab_size, groups.layout.tp),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        position_embedding_type="rope" if use_te else "none",  # local layers have rope.py
        rotary_base=arch.rope_theta,
        rotary_percent=(arch.rotary_dim or arch.head_dim) / arch.head_dim,
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
    """The chunks, in 16 bits where the config asks for it."""
    if not (config.bf16 or config.fp16):
        return list(chunks)
    with biases_kept(chunks):
        return [Float16Module(config, chunk) for chunk in chunks]
