"""A model family: the rules of its layers, and how its config.json is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rl.weights.families.rows import QK_NORM, QKV_BIAS
from megatron_rl.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class MixtureFields:
    """The fields of config.json that describe a mixture of experts."""

    ffn_hidden_size: str
    """The field with the size of one expert."""

    renormalized: bool | None = None
    """True: the chosen experts' probabilities are scaled to sum to 1; None: norm_topk_prob says."""

    has_dense_layers: bool = False
    """True: decoder_sparse_step and mlp_only_layers can make some layers dense."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: the rules of its layers, and which config fields mean what."""

    model_type: str
    architecture: str
    """The class of transformers and vLLM, as config.json's `architectures` names it."""

    attention: tuple[Rule, ...]
    """The norms and the attention of every layer."""

    dense: tuple[Rule, ...]
    """The feed-forward network of a layer without experts."""

    router: tuple[Rule, ...] = ()
    """The router of a layer with experts."""

    experts: tuple[Rule, ...] = ()
    """The matrices of each expert of such a layer; `{e}` is the expert's number."""

    defaults: Mapping[str, object] = field(default_factory=dict)
    """Values that transformers takes for absent fields of this family; others are in
    hf_config.DEFAULTS."""

    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Fields that we do not implement, with the values at which they change nothing."""

    mixture: MixtureFields | None = None

    @property
    def qkv_bias(self) -> bool:
        return QKV_BIAS in self.attention

    @property
    def qk_norm(self) -> bool:
        return set(QK_NORM) <= set(self.attention)
