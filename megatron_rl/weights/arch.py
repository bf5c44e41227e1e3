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


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN's scaling of rotary angles (arXiv:2309.00071, section 3)."""

    factor: float  # by which the context of pretraining is stretched
    original_max_position_embeddings: int  # that context, in tokens
    beta_fast: float  # waves that turn more often in it are not stretched
    beta_slow: float  # waves that turn less often in it are stretched by the whole factor
    amplitude: float  # of cosines and sines
    rounds_range: bool  # the range between the two ends at whole dimensions

    @property
    def positions(self) -> int:
        """Tokens that the stretched context has."""
        return int(self.original_max_position_embeddings * self.factor)


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
    mixture: MixtureArch | None = None
    yarn: YarnRope | None = None
    rotary_dim: int | None = None  # entries of a head, the first ones, that turn; None: all
    layers_behind: int = 0  # that a checkpoint may hold behind the last one, and that are left out

    @property
    def query_rows(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_rows(self) -> int:
        return self.num_query_groups * self.head_dim

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

    def has_experts(self, layer: int) -> bool:
        """True where a layer, counted over the whole model, is a mixture of experts."""
        return self.mixture is not None and layer not in self.mixture.dense_layers

    @property
    def described(self) -> str:
        """The model in a line of a report."""
        told = f"{self.model_type}, {self.num_parameters:,} parameters"
        if self.layers_behind:
            told += f" (without {self.layers_behind} behind the last layer, for guessing ahead)"
        return told

    @property
    def num_parameters(self) -> int:
        attention = self.hidden_size * (2 * self.query_rows + 2 * self.key_rows)
        bias = (self.query_rows + 2 * self.key_rows) if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        layers = sum(
            attention + bias + norms + self._feed_forward_parameters(layer)
            for layer in range(self.num_layers)
        )
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return layers + embeddings + self.hidden_size

    def _feed_forward_parameters(self, layer: int) -> int:
        if self.mixture is None or not self.has_experts(layer):
            return 3 * self.hidden_size * self.ffn_hidden_size
        expert = 3 * self.hidden_size * self.mixture.ffn_hidden_size
        shared = 3 * self.hidden_size * self.mixture.shared_ffn_hidden_size
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
