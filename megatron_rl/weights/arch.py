"""The architecture of a decoder, in numbers; a family reads it from a config.json."""

from dataclasses import dataclass
from typing import Literal

VOCAB_MULTIPLE = 64  # vLLM's padding


@dataclass(frozen=True, kw_only=True)
class MixtureArch:
    """The mixture-of-experts layers of a model."""

    num_experts: int
    ffn_hidden_size: int  # of one expert
    top_k: int  # experts per token
    renormalized: bool  # True: the chosen experts' probabilities are scaled to sum to 1
    dense_layers: frozenset[int] = frozenset()  # layers with one ordinary feed-forward network
    score: Literal["softmax", "sigmoid"] = "softmax"  # of a router's logits
    has_bias: bool = False  # experts are chosen by score + bias, and weighed by the score
    scale: float = 1.0  # by which the chosen experts' probabilities are multiplied
    shared_ffn_hidden_size: int = 0  # of the expert that every token meets; 0: there is none
    has_shared_gate: bool = False  # its output is multiplied by a sigmoid of the token
    num_groups: int = 1  # of experts, of which a token goes to those of the best alone
    chosen_groups: int = 1  # those groups


@dataclass(frozen=True, kw_only=True)
class LatentArch:
    """Attention whose keys and values come from one latent vector of a token (arXiv:2405.04434).

    A head of queries and keys has entries that turn behind others that do not. Those of the keys
    are the same in every head.
    """

    rank: int  # of the vector of keys and values
    query_rank: int | None  # of that of queries; None: queries come from the hidden state itself
    still_dim: int  # entries of a head that do not turn
    turning_dim: int
    value_dim: int  # entries of a head of values
    interleaved: bool  # True: neighbours turn together; False: the halves of the turning entries

    @property
    def head_dim(self) -> int:
        """Entries of a head of queries and keys."""
        return self.still_dim + self.turning_dim

    @property
    def down_rows(self) -> int:
        """Rows that make the latent vector and the turning entries of keys."""
        return self.rank + self.turning_dim


@dataclass(frozen=True, kw_only=True)
class DeltaArch:
    """Gated delta nets (arXiv:2412.06464), which most layers have in the place of attention.

    A head of values has a state of its own; those of several share a head of queries and keys.
    """

    attention_layers: frozenset[int]  # the others, which have attention
    num_key_heads: int
    num_value_heads: int
    key_dim: int  # entries of a head of queries and keys
    value_dim: int
    kernel: int  # tokens that the convolution before the net sees

    @property
    def key_rows(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_rows(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def mixed_rows(self) -> int:
        """Rows of queries, keys and values, which the convolution goes over."""
        return 2 * self.key_rows + self.value_rows

    @property
    def in_rows(self) -> int:
        """Those, the gates of values, and two numbers for each of their heads."""
        return self.mixed_rows + self.value_rows + 2 * self.num_value_heads


@dataclass(frozen=True, kw_only=True)
class SlidingArch:
    """Layers in which a token sees the newest ones alone, itself among them."""

    window: int  # that many tokens
    layers: frozenset[int]
    rope_theta: float | None = None  # of their own, plain rope; None: they turn as the others do


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN's scaling of rotary angles (arXiv:2309.00071, section 3)."""

    factor: float  # by which the context of pretraining is stretched
    original_max_position_embeddings: int  # that context, in tokens
    beta_fast: float  # waves that turn more often in it are not stretched
    beta_slow: float  # waves that turn less often in it are stretched by the whole factor
    amplitude: float  # of cosines and sines
    rounds_range: bool  # the range between the two ends at whole dimensions
    score_mscale: float = 0.0  # DeepSeek's mscale_all_dim: scores grow with it; 0: they do not

    @property
    def positions(self) -> int:
        """Tokens that the stretched context has."""
        return int(self.original_max_position_embeddings * self.factor)


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE's scaling of rotary angles (arXiv:2402.13753), in the context of pretraining.

    Behind it other factors scale them: in transformers where a text is longer, in vLLM where one
    may be. So texts end there.
    """

    positions: int  # of that context
    factors: tuple[float, ...]  # by which each wave is stretched
    amplitude: float  # of cosines and sines


@dataclass(frozen=True, kw_only=True)
class ModelArch:
    """Sizes and switches of one model."""

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # rows of the embedding in the checkpoint
    rms_norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None  # llama3 scaling; None: plain rope
    max_position_embeddings: int
    qkv_bias: bool
    tied_embeddings: bool
    qk_norm: bool = False  # norms over head_dim on queries and keys, before rope
    wide_qk_norm: bool = False  # then over all heads together
    norms_behind: bool = False  # of attention and feed-forward network, in place of those before
    turns_in_float32: bool = False  # heads of 16 bits are turned in float32, and rounded then
    mixture: MixtureArch | None = None
    yarn: YarnRope | None = None
    long_rope: LongRope | None = None
    rotary_dim: int | None = None  # entries of a head, the first ones, that turn; None: all
    layers_behind: int = 0  # that a checkpoint may hold behind the last one, and that are left out
    latent: LatentArch | None = None  # then every head has keys and values of its own
    delta: DeltaArch | None = None  # then attention has gates, and norms multiply by 1 + weight
    sliding: SlidingArch | None = None  # where some layers do not see all that is before a token

    @property
    def query_rows(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_rows(self) -> int:
        return self.num_query_groups * self.head_dim

    @property
    def value_rows(self) -> int:
        """Columns of the output projection."""
        dim = self.head_dim if self.latent is None else self.latent.value_dim
        return self.num_attention_heads * dim

    @property
    def latent_rows(self) -> list[tuple[str, int]]:
        """(name, number) of the rows that make latent vectors, which tensor parallelism cuts."""
        if self.latent is None:
            return []
        rows = [("rows of the latent vector and turning entries of keys", self.latent.down_rows)]
        if self.latent.query_rank is not None:
            rows.append(("rows of the latent vector of queries", self.latent.query_rank))
        return rows

    @property
    def delta_heads(self) -> list[tuple[str, int]]:
        """(name, number) of the heads of gated delta nets, which tensor parallelism cuts."""
        if self.delta is None:
            return []
        return [
            ("key heads of gated delta nets", self.delta.num_key_heads),
            ("value heads of gated delta nets", self.delta.num_value_heads),
        ]

    @property
    def normed_rows(self) -> list[tuple[str, int]]:
        """(name, number) of the key heads, where a norm over all of them lets none be repeated."""
        if not self.wide_qk_norm:
            return []
        return [("key/value heads, over which a norm goes,", self.num_query_groups)]

    @property
    def dense_rows(self) -> list[tuple[str, int]]:
        """(name, number) of the rows that tensor parallelism cuts where every token goes."""
        rows = []
        if not all(self.has_experts(layer) for layer in range(self.num_layers)):
            rows.append(("rows of the feed-forward layer", self.ffn_hidden_size))
        if self.mixture is not None and self.mixture.shared_ffn_hidden_size:
            rows.append(("rows of the shared expert", self.mixture.shared_ffn_hidden_size))
        return rows

    @property
    def expert_rows(self) -> list[tuple[str, int]]:
        """(name, number) of the rows that tensor parallelism cuts in an expert, if there is one."""
        return [("rows of an expert", self.mixture.ffn_hidden_size)] if self.mixture else []

    @property
    def has_gates(self) -> bool:
        """True where every query of attention has a gate beside it, of its output."""
        return self.delta is not None

    @property
    def qkv_rows(self) -> int:
        """Rows of the matrix that makes queries, their gates, keys and values."""
        return (2 if self.has_gates else 1) * self.query_rows + 2 * self.key_rows

    @property
    def widest_mixer(self) -> int:
        """Rows of the largest product before tokens are brought together."""
        return max(self.qkv_rows, self.delta.in_rows if self.delta is not None else 0)

    def has_attention(self, layer: int) -> bool:
        """True where a layer, counted over the whole model, has attention, and no delta net."""
        return self.delta is None or layer in self.delta.attention_layers

    @property
    def num_attention_layers(self) -> int:
        return self.num_layers if self.delta is None else len(self.delta.attention_layers)

    def keys_seen(self, length: int) -> float:
        """Keys that a token of a sequence of such a length sees on average, over all layers."""
        whole, sliding = length / 2, self.sliding
        if sliding is None or sliding.window >= length:
            return whole * self.num_attention_layers
        near, count = sliding.window * (1 - sliding.window / length / 2), len(sliding.layers)
        return whole * (self.num_attention_layers - count) + near * count

    def has_experts(self, layer: int) -> bool:
        """True where a layer, counted over the whole model, is a mixture of experts."""
        return self.mixture is not None and layer not in self.mixture.dense_layers

    @property
    def described(self) -> str:
        """The model in a line of a report."""
        told = f"{self.model_type}, {self.num_parameters:,} parameters"
        if self.layers_behind:
            told += f" (without {self.layers_behind} behind the last layer, for guessing ahead)"
        if self.long_rope is not None:
            end = f"{self.long_rope.positions:,}"
            told += f" (in texts of up to {end} tokens, behind which its rope has other factors)"
        return told

    @property
    def num_parameters(self) -> int:
        layers = sum(
            self._mixer_parameters(layer)
            + 2 * self.hidden_size
            + self._feed_forward_parameters(layer)
            for layer in range(self.num_layers)
        )
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return layers + embeddings + self.hidden_size

    def _mixer_parameters(self, layer: int) -> int:
        """Those of what brings tokens together, without the norm of hidden states."""
        if self.delta is not None and layer not in self.delta.attention_layers:
            delta = self.delta
            products = self.hidden_size * (delta.in_rows + delta.value_rows)
            numbers = 2 * delta.num_value_heads + delta.value_dim
            return products + delta.kernel * delta.mixed_rows + numbers
        of_heads = self.query_rows + self.key_rows if self.wide_qk_norm else 2 * self.head_dim
        return self.attention_parameters + (of_heads if self.qk_norm else 0)

    @property
    def attention_parameters(self) -> int:
        """Those of one layer with attention, without norms of hidden states and of heads."""
        if self.latent is None:
            bias = self.qkv_rows if self.qkv_bias else 0
            return self.hidden_size * (self.qkv_rows + self.query_rows) + bias
        latent = self.latent
        queries = self.hidden_size * self.query_rows
        if latent.query_rank is not None:
            queries = latent.query_rank * (self.hidden_size + 1 + self.query_rows)
        raised = self.num_attention_heads * (latent.still_dim + latent.value_dim)
        keys = self.hidden_size * latent.down_rows + latent.rank * (1 + raised)
        return queries + keys + self.hidden_size * self.value_rows

    def _feed_forward_parameters(self, layer: int) -> int:
        if self.mixture is None or not self.has_experts(layer):
            return 3 * self.hidden_size * self.ffn_hidden_size
        expert = 3 * self.hidden_size * self.mixture.ffn_hidden_size
        shared = 3 * self.hidden_size * self.mixture.shared_ffn_hidden_size
        shared += self.hidden_size if self.mixture.has_shared_gate else 0
        bias = self.mixture.num_experts if self.mixture.has_bias else 0
        return self.mixture.num_experts * (expert + self.hidden_size) + bias + shared


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding with padding: a multiple of vLLM's, that tp divides.

    With the same padding on both sides, a rank's shard of the vocabulary is the same in policy and
    engine at equal tp, so it need not move.
    """
    multiple = VOCAB_MULTIPLE
    while multiple % tp:
        multiple += VOCAB_MULTIPLE
    return -(-vocab_size // multiple) * multiple
