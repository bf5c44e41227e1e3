"""Bytes that a forward pass keeps for its backward: from sizes, tensor by tensor.

A layer of the model as it is built here, of H hidden units, Q and K rows of queries and keys, F of
the feed-forward network; one number is one element per token:

    kept                                          local layers        Transformer Engine's
    input and output of both norms                4 H                 4 H
    their inputs, normalised (or cast, twice)     2 H  (*)
    queries, keys, values, output of attention    5 Q, or 2 Q + 2 K   3 Q + 3 K
    up and gate, and their product                3 F  (on a CPU)     3 F
    and of them silu, +0                          2 F  (on a GPU)

(*) on a CPU, but for float32, whose norms are native there (ops/fused_layers.py).

The attention of 16 bits on a GPU takes packed rows as they are. Elsewhere keys and values are
repeated to as many heads as queries have, and sequences padded to blocks. A mixture has this of the
feed-forward network once for every expert of a token, and the tokens as they were sent to the
experts. Latent attention has 4 Q and V rows of values on any device, and the two norms of its
latent vectors.
"""

import functools
from dataclasses import dataclass

from megatron_rl.megatron.config import Attention, ModelConfig
from megatron_rl.megatron.delta_rule import CHUNK
from megatron_rl.ops import native
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.stages import layers_of_stages
from megatron_rl.weights.arch import ModelArch


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What a token leaves behind in the layers of one rank of a layout."""

    arch: ModelArch
    model: ModelConfig
    parallel: ParallelConfig
    device_type: str
    itemsize: int  # of model.dtype

    def kept(self, row_tokens: int, num_rows: int, pp_rank: int = 0) -> float:
        """Bytes at the end of the forward pass of a row, or of all that a rank has at hand.

        num_rows: of an update, which a pipeline has several of at a time.
        """
        ranks = self.parallel.pipeline_model_parallel_size
        chunks = self.parallel.virtual_pipeline_model_parallel_size or 1
        stages = layers_of_stages(self.arch.num_layers, ranks, chunks, self.parallel.split)
        # Megatron's schedules have one forward and one backward in turns, once every rank that
        # follows has a row.
        behind = ranks - 1 - pp_rank
        at_hand = behind + 1 if chunks == 1 else 2 * behind + (chunks - 1) * ranks + 1
        of_token = max(map(self._of_layers, stages[pp_rank::ranks]))
        return row_tokens * min(at_hand, num_rows * chunks) * of_token

    def of_one_net(self, row_tokens: int) -> float:
        """Bytes that a backward makes anew of the gated delta net whose turn it is."""
        delta = self.arch.delta
        if delta is None:
            return 0.0
        of_head = 8 * delta.key_dim + delta.value_dim + 9.2 * CHUNK  # rows, and chunks squared
        of_head += 2 * delta.key_dim * delta.value_dim / CHUNK  # states
        numbers = (delta.kernel + 2) * delta.mixed_rows + delta.num_value_heads * of_head
        wide = max(4, self.itemsize)
        return row_tokens * numbers * wide / self.parallel.tensor_model_parallel_size

    def _of_layers(self, layers: range) -> float:
        """Bytes a token in these layers, at the peak of a backward that computes them anew."""
        whole, count = sum(map(self.of_layer, layers)), len(layers)
        if self.model.recompute_granularity != "full" or not layers:
            return whole
        unit = self.model.recompute_num_layers or 1
        inputs = self.arch.hidden_size * self.itemsize / self._sequence_ranks
        if self.model.recompute_method == "block":  # the first ones, each by itself
            anew = min(unit, count)
            return anew * inputs + self.of_layer(layers[0]) + whole * (count - anew) / count
        return count / unit * inputs + whole * min(unit, count) / count

    def of_layer(self, layer: int) -> float:
        """Bytes a token keeps in a layer, counted over the whole model."""
        arch, size = self.arch, self.itemsize
        kind = self._attention
        is_local = kind != "transformer_engine"
        tp, hidden = self.parallel.tensor_model_parallel_size, arch.hidden_size
        queries, keys = arch.query_rows / tp, arch.key_rows / tp
        # Outputs of both norms, and their inputs or, of 16 bits on a CPU, casts and normalised.
        shared = 2.0 * hidden * size + 2 * self._of_norm(hidden)
        if not arch.has_attention(layer):
            attention = self._of_delta_net()
        elif arch.latent is not None:
            attention = self._of_latent_attention()
        elif kind == "transformer_engine":
            attention = 3.0 * (queries + keys) * size
        else:
            attended = 5.0 * queries if kind == "blocks" else 2.0 * (queries + keys)
            attention = attended * size + 4 * arch.num_attention_heads / tp
        if arch.has_gates and arch.has_attention(layer):
            attention += self._of_gates(queries)
        if arch.qk_norm and arch.has_attention(layer):
            attention += self._of_norm(queries + keys, is_fused=not arch.wide_qk_norm)
            # The product that both were cut from; a norm over all heads has copied its part.
            if self._is_unfused and size > 2 and not arch.wide_qk_norm:
                attention += (queries + keys) * size
        return shared / self._sequence_ranks + attention + self._of_feed_forward(layer, is_local)

    @functools.cached_property
    def _attention(self) -> Attention:
        return self.model.attention(self.device_type, self.arch.head_dim)

    def _of_latent_attention(self) -> float:
        """Bytes of queries, keys, values and their output, and of the latent vectors."""
        arch, latent = self.arch, self.arch.latent
        assert latent is not None
        tp = self.parallel.tensor_model_parallel_size
        # Values are padded to the width of keys; what is cut from the output is kept beside it.
        heads = (4 * arch.query_rows + arch.value_rows) / tp * self.itemsize
        vectors = latent.rank + (latent.query_rank or 0)
        of_vectors = vectors * self.itemsize + self._of_norm(vectors)
        return heads + 4 * arch.num_attention_heads / tp + of_vectors / self._sequence_ranks

    def _of_gates(self, queries: float) -> float:
        """Bytes of the gates of attention's output: bounded, and what they were cut from."""
        return 3 * queries * self.itemsize

    def _of_delta_net(self) -> float:
        """Bytes of a net's products, its output and the norm of that; what is between is anew."""
        delta, size = self.arch.delta, self.itemsize
        assert delta is not None
        # Output, normed twice, gates twice: in float32 at least, where the first gates are cut from
        # the first product.
        wide = (4 if size >= 4 else 5) * max(4, size)
        rows = (delta.in_rows + delta.value_rows) * size + delta.value_rows * wide
        return rows / self.parallel.tensor_model_parallel_size

    def _of_feed_forward(self, layer: int, is_local: bool) -> float:
        arch, parallel = self.arch, self.parallel
        tp = parallel.tensor_model_parallel_size
        of_unit = 5.0 if is_local and self.device_type != "cpu" else 3.0
        if arch.mixture is None or not arch.has_experts(layer):
            return of_unit * arch.ffn_hidden_size / tp * self.itemsize
        mixture = arch.mixture
        experts_tp = parallel.expert_tensor_parallel_size or tp
        # Each expert's output is scaled by its probability, so one more is kept. Ranks that share
        # experts and no matrix of one have as many fewer tokens there as they share of a sequence.
        # On a CPU the scaled one is made anew.
        scaled = 0.0 if self.device_type == "cpu" else 1.0
        rows = (of_unit + scaled) * mixture.ffn_hidden_size / experts_tp + arch.hidden_size
        rows *= experts_tp / tp
        router = 6 * 4.0 * mixture.num_experts / self._sequence_ranks
        # The expert that every token meets is a feed-forward network beside them.
        shared = of_unit * mixture.shared_ffn_hidden_size / tp
        # What the gate of that one was multiplied with.
        sums = (1 if mixture.has_shared_gate else 0) * arch.hidden_size / self._sequence_ranks
        return self.itemsize * (mixture.top_k * rows + sums + shared) + router

    def _of_norm(self, width: float, *, is_fused: bool = True) -> float:
        """Bytes of what a norm keeps besides its output; is_fused: where there is one that is."""
        if is_fused and not self._is_unfused:
            return width * (max(4, self.itemsize) if self._is_wide else self.itemsize)
        # The input and the normalised input, which a norm of 16 bits has in float32.
        return 2 * width * max(4, self.itemsize)

    @property
    def _is_unfused(self) -> bool:
        """True where torch takes a norm apart into its steps, as on a CPU."""
        is_native = native.BUILT and (self.itemsize == 4 or (self._is_wide and self.itemsize < 4))
        return self.device_type == "cpu" and not is_native

    @property
    def _is_wide(self) -> bool:
        """True where norms have weights around 1, which are computed in float32 at least."""
        return self.device_type == "cpu" and self.arch.delta is not None

    @property
    def _sequence_ranks(self) -> int:
        """Ranks that share what lies between the matrix products of a layer."""
        parallel = self.parallel
        return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
