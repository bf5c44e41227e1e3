"""The gated delta net of packed rows, in the place of Megatron-Core's (faults.py says why).

Its parameters and their names in a checkpoint are those of the stock module. Between its two
products all is computed in float32, or in float64 where the model is.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_rl.megatron.attention import PackedRows
from megatron_rl.megatron.delta_rule import DeltaRow, by_chunks, convolved, delta_row, next_token

EPSILON = 1e-6  # of the lengths of queries and keys, in transformers and vLLM


class DeltaNet(GatedDeltaNet):
    """A gated delta net of T tokens, of which no sequence of a row sees another."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Every rank has the gradient of its own heads, whatever is sequence parallel (see _gated).
        self.out_norm.weight.sequence_parallel = False

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        self.gated_delta_rule = by_chunks

    def reset_parameters(self) -> None:
        """Draw nothing: every weight is loaded."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedRows | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[T, 1, H] -> the same; [T/tp, 1, H] under sequence parallelism."""
        assert packed_seq_params is not None
        rows = packed_seq_params
        product, _ = self.in_proj(hidden_states)
        heads = self.num_v_heads_local_tp
        mixed, gate, share, decay = product[:, 0].split(
            [self.conv_dim_local_tp, self.v_dim_local_tp, heads, heads], dim=-1
        )
        if rows.remembered is not None:
            out = rows.remembered.recur(self, mixed, share, decay)
        elif torch.is_grad_enabled():
            # What stands between would be several times as large as all else of a layer.
            core = functools.partial(self.whole, row=self.planned(rows))
            out = checkpoint(
                core, mixed, share, decay, use_reentrant=False, preserve_rng_state=False
            )[0]
        else:
            out = self.whole(mixed, share, decay, row=self.planned(rows))[0]
        normed = self._gated(out, gate)
        projected, bias = self.out_proj(normed[:, None])
        return projected, bias

    def planned(self, rows: PackedRows) -> DeltaRow:
        """The plan of a row, which its first net makes."""
        if rows.delta is None:
            assert rows.runs is not None
            device = self.conv1d.weight.device
            rows.delta = delta_row(*rows.runs, kernel=self.conv_kernel_dim, device=device)
        return rows.delta

    def whole(
        self, mixed: Tensor, share: Tensor, decay: Tensor, *, row: DeltaRow
    ) -> tuple[Tensor, Tensor]:
        """Outputs [T, heads/tp, v], and the last states of runs that begin a sequence.

        mixed: [T, rows/tp] queries, keys and values before the convolution. share, decay:
        [T, heads/tp], before they are bounded.
        """
        weight = self.conv1d.weight
        seen = convolved(_wide(mixed), _wide(weight), row)
        out, last = by_chunks(*self.heads(seen, share, decay), row)
        return out.to(mixed.dtype), last

    def next(
        self, seen: Tensor, share: Tensor, decay: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of one token of each of n sequences with these states.

        seen: [n, kernel, rows/tp] its queries, keys and values, behind those of tokens before it.
        """
        mixed = torch.einsum("nkr,rk->nr", _wide(seen), _wide(self.conv1d.weight)[:, 0])
        out, state = next_token(*self.heads(mixed, share, decay), state)
        return out.to(seen.dtype), state

    def heads(
        self, seen: Tensor, share: Tensor, decay: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, decays and shares as the rule takes them; seen: convolved."""
        keys, values = self.num_k_heads_local_tp, self.num_v_heads_local_tp
        query, key, value = F.silu(seen).split(
            [self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp], dim=-1
        )
        query, key = (
            _of_length_one(x.unflatten(-1, (keys, -1))).repeat_interleave(values // keys, dim=1)
            for x in (query, key)
        )
        bounded = -_wide(self.A_log).exp() * F.softplus(_wide(decay) + _wide(self.dt_bias))
        value = value.unflatten(-1, (values, -1))
        return query * self.key_head_dim**-0.5, key, value, bounded, _wide(share).sigmoid()

    def _gated(self, out: Tensor, gate: Tensor) -> Tensor:
        """[T, rows/tp] the outputs [T, heads/tp, v], normed by head, times silu of their gates."""
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight, self.tp_group)
        wide = _wide(out)
        normed = F.rms_norm(wide, wide.shape[-1:], _wide(weight), self.config.layernorm_epsilon)
        gated: Tensor = normed.flatten(1) * F.silu(_wide(gate))
        return gated.to(out.dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32, or as it is where that is narrower."""
    return x if x.dtype == torch.float64 else x.float()


def _of_length_one(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)
