"""A model family: the rules of its layers, and how its config.json is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.rows import (
    LATENT_QUERIES,
    NORMED_ATTENTION,
    QK_NORM,
    QKV_BIAS,
    QUERIES,
    WIDE_QK_NORM,
)
from megatron_rl.weights.rules import ExpertStack, Rule


@dataclass(frozen=True, kw_only=True)
class MixtureFields:
    """The fields of config.json that describe a mixture of experts."""

    ffn_hidden_size: str
    """The field with the size of one expert."""

    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    """The fields with the number of experts: spellings of one thing."""

    renormalized: bool | None = None
    """True: the chosen experts' probabilities are scaled to sum to 1; None: norm_topk_prob says."""

    has_dense_layers: bool = False
    """True: decoder_sparse_step and mlp_only_layers can make some layers dense."""

    shared_ffn_hidden_size: str | None = None
    """The field with the size of an expert that every token meets, whose output has a gate."""

    has_groups: bool = False
    """True: n_group says of how many groups of experts topk_group are chosen first."""

    has_layer_types: bool = False
    """True: mlp_layer_types says once more which layers are dense."""

    is_sigmoid: bool = False
    """True: as DeepSeek-V3 has it (arXiv:2412.19437, section 2.1.2). Scores are sigmoids, a bias
    corrects the choice, routed_scaling_factor scales the chosen probabilities, n_shared_experts say
    how wide the expert is that every token meets, and the first first_k_dense_replace layers are
    dense."""

    @property
    def of_dense_layers(self) -> tuple[str, ...]:
        """The fields that say which layers are dense."""
        if self.is_sigmoid:
            return ("first_k_dense_replace",)
        return ("decoder_sparse_step", "mlp_only_layers") if self.has_dense_layers else ()

    @property
    def used(self) -> frozenset[str]:
        """The fields that are read."""
        named = (*self.num_experts, *self.of_dense_layers)
        own = frozenset({self.ffn_hidden_size, "num_experts_per_tok", *named})
        if self.renormalized is None:
            own |= {"norm_topk_prob"}
        if self.shared_ffn_hidden_size is not None:
            own |= {self.shared_ffn_hidden_size}
        if self.is_sigmoid:
            own |= {"routed_scaling_factor", "n_shared_experts"}
        if self.has_groups:
            own |= {"n_group", "topk_group"}
        if self.has_layer_types:
            own |= {"mlp_layer_types"}
        return own


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: the rules of its layers, and which config fields mean what."""

    model_type: str
    architecture: str
    """The class of transformers and vLLM, as config.json's `architectures` names it."""

    attention: tuple[Rule, ...]
    """The norms and the attention of every layer that has attention."""

    delta: tuple[Rule, ...] = ()
    """The norms and the gated delta net of the others; where there are none, all have attention."""

    dense: tuple[Rule, ...]
    """The feed-forward network of a layer without experts."""

    router: tuple[Rule, ...] = ()
    """The router of a layer with experts."""

    experts: tuple[Rule, ...] = ()
    """The matrices of each expert of such a layer; `{e}` is the expert's number."""

    expert_stacks: tuple[ExpertStack, ...] = ()
    """Where files hold a matrix of all experts of a layer in one tensor; empty: each alone."""

    defaults: Mapping[str, object] = field(default_factory=dict)
    """Values that transformers takes for absent fields of this family; others are in
    hf_config.DEFAULTS."""

    engine_defaults: Mapping[str, object] = field(default_factory=dict)
    """Values that vLLM takes for absent fields which transformers does not ask."""

    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Fields that we do not implement, with the values at which they change nothing."""

    mixture: MixtureFields | None = None

    partial_rotary: float | None = None
    """The share of a head that turns where partial_rotary_factor is absent; None: heads turn
    whole, and the field is refused."""

    has_latent_attention: bool = False
    """True: as DeepSeek-V2 has it (arXiv:2405.04434)."""

    has_long_rope: bool = False
    """True: as Phi-3 has it (arXiv:2404.14219). Rope is plain or LongRoPE's."""

    has_delta: bool = False
    """True: layers that layer_types names have a gated delta net (arXiv:2412.06464), the others
    attention whose output has gates; norms of hidden states and of heads multiply by 1 + weight."""

    windows: Literal["all", "all or none", "by layer"] | None = None
    """Which layers have the sliding window that config.json tells: all of them; all or none, as
    use_sliding_window, max_window_layers and layer_types say; those that layer_types names, or
    three of four, which also have a plain rope. None: windows are refused."""

    turns_in_float32: bool = False
    """True: transformers turns heads of 16 bits in float32, and rounds what comes of it."""

    has_optional_qk_norm: bool = False
    """True: use_qk_norm says whether queries and keys have norms."""

    has_layers_behind: bool = False
    """True: a checkpoint may hold layers behind the last one, which guess tokens ahead and which
    the network does without."""

    def attention_of(self, arch: ModelArch, layer: int) -> tuple[Rule, ...]:
        """The norms of a layer, and what it has to bring tokens together."""
        if not arch.has_attention(layer):
            return self.delta
        absent: set[Rule] = set() if arch.qk_norm else set(QK_NORM)
        if arch.latent is not None:
            absent |= set(QUERIES if arch.latent.query_rank is not None else LATENT_QUERIES)
        return tuple(rule for rule in self.attention if rule not in absent)

    @property
    def qkv_bias(self) -> bool:
        return QKV_BIAS in self.attention

    @property
    def qk_norm(self) -> bool:
        return set(QK_NORM) <= set(self.attention) or self.wide_qk_norm

    @property
    def wide_qk_norm(self) -> bool:
        return set(WIDE_QK_NORM) <= set(self.attention)

    @property
    def norms_behind(self) -> bool:
        return set(NORMED_ATTENTION) <= set(self.attention)
