"""Latent attention of packed rows, in the place of Megatron-Core's (faults.py says why).

Its parameters, its norms and its core attention are those of the stock module.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from megatron_rl.megatron.attention import PackedRows

RESOLVED = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")


class LatentAttention(MLASelfAttention):
    """Queries, keys and values of T tokens, which are turned here by the angles of the row.

    Only the turning entries of keys are turned once for all heads, so core attention turns nothing.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The parts that the layer spec names, as they stand."""
        return {name: getattr(submodules, name) for name in RESOLVED}

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
        inference_context: Any = None,
        **_: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[T, heads/tp, d] queries and keys, [T, heads/tp, v] values, and the latent vectors.

        hidden_states: [T, 1, H], or [T/tp, 1, H] under sequence parallelism.
        """
        assert packed_seq_params is not None
        assert packed_seq_params.rotation is not None
        turned = packed_seq_params.rotation.turned
        config, heads = self.config, self.num_attention_heads_per_partition
        of_queries, latent, turning_keys = self._latent(hidden_states)
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(of_queries)
        else:
            query, _ = self.linear_q_up_proj(of_queries)
        raised, _ = self.linear_kv_up_proj(latent)
        query, raised = (x.unflatten(-1, (heads, -1)) for x in (query, raised))
        still, turning = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        key, value = raised.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        turning_keys = turned(turning_keys[:, None]).expand(-1, heads, -1)
        return (
            torch.cat([still, turned(turning)], dim=-1),
            torch.cat([key, turning_keys], dim=-1),
            value.contiguous(),  # a view would keep the product that it was cut from
            of_queries,
            latent,
        )

    def _latent(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, and what keys and values are made from, and the turning entries of keys.

        [t, q], [t, rank], [T, r]; t: as many tokens as hidden_states has.
        """
        config = self.config
        of_queries = hidden_states.squeeze(1)
        if config.q_lora_rank is not None:
            whole = _whole(self.linear_q_down_proj, hidden_states, config.q_lora_rank)
            of_queries = self.q_layernorm(self._own(whole))
        sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        latent, turning = _whole(self.linear_kv_down_proj, hidden_states, sum(sizes)).split(
            sizes, dim=-1
        )
        # Every rank has the gradient of its own heads, which nothing else would add up.
        turning = copy_to_tensor_model_parallel_region(turning, self.tp_group)
        return of_queries, self.kv_layernorm(self._own(latent)), turning

    def _own(self, whole: Tensor) -> Tensor:
        """[T, n] -> this rank's run of the tokens under sequence parallelism."""
        if not self.config.sequence_parallel:
            return whole
        own: Tensor = scatter_to_sequence_parallel_region(whole, self.tp_group)
        return own


def _whole(linear: Any, hidden_states: Tensor, rows: int) -> Tensor:
    """[T, rows] of a product of which every tensor-parallel rank has some."""
    product, _ = linear(hidden_states)
    if product.size(-1) < rows:
        product = gather_from_tensor_model_parallel_region(product, linear.tp_group)
    whole: Tensor = product.squeeze(1)
    return whole
