"""What a model family is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_rl.weights.families.rows import QK_NORM, QKV_BIAS
from megatron_rl.weights.rules import Rule


@dataclass(frozen=True, kw_only=True)
class MixtureFields:
    """Where config.json tells of a mixture of experts."""

    ffn_hidden_size: str
    """The field with the size of one expert."""

    renormalized: bool | None = None
    """Whether the chosen experts' probabilities are scaled to 1; None: norm_topk_prob says."""

    has_dense_layers: bool = False
    """Whether decoder_sparse_step and mlp_only_layers make some layers dense."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: the rows of its layers, and which config fields mean what."""

    model_type: str
    attention: tuple[Rule, ...]
    """Every layer's: norms and attention."""

    dense: tuple[Rule, ...]
    """The feed-forward network of a layer without experts."""

    router: tuple[Rule, ...] = ()
    """Of a layer with experts."""

    experts: tuple[Rule, ...] = ()
    """Of each expert of such a layer; `{e}` is its number."""

    defaults: Mapping[str, object] = field(default_factory=dict)
    """What transformers takes where config.json says nothing, beside hf_config.DEFAULTS."""

    neutral: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Fields we do not implement, with the values under which they change nothing."""

    mixture: MixtureFields | None = None

    @property
    def qkv_bias(self) -> bool:
        return QKV_BIAS in self.attention

    @property
    def qk_norm(self) -> bool:
        return set(QK_NORM) <= set(self.attention)
