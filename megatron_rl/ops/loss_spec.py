"""The arguments of a native loss besides tensors, and the order of its measurements.

Each order is an enum of csrc/token_loss/token_terms.h too; tests/csrc compares them. Settings are
made of these, so torch is imported for type checking only.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

LossKind = Literal["likelihood", "clipped_ratio", "cispo", "sapo"]
KlEstimator = Literal["k1", "k2", "k3"]
CorrectionLevel = Literal["token", "sequence", "geometric"]
CorrectionMode = Literal["truncate", "mask"]

LOSS_KINDS: tuple[LossKind, ...] = get_args(LossKind)
KL_ESTIMATORS: tuple[KlEstimator, ...] = get_args(KlEstimator)

MAX_LOG_RATIO = 20.0
"""Differences of log-probabilities are clamped to this before exp(); no gradient beyond it."""

SUMS = (
    "tokens",  # with weight != 0; the only ones that any entry below speaks about
    "clip_low",
    "clip_high",
    "dual_clip",
    "ratio_tokens",  # tokens whose ratio is known
    "ratio",
    "kl_old_k1",  # of KL(old || current)
    "kl_old_k3",
    "entropy_tokens",
    "entropy",
    "ref_tokens",
    "kl_ref_k1",  # of KL(current || ref)
    "kl_ref_k3",
    "rollout_tokens",
    "gap",  # old - rollout
    "abs_gap",
    "gap_k3",  # of KL(rollout || old)
    "corrected_tokens",  # tokens whose own term has a correction
    "correction",
    "correction_bounded",  # tokens whose correction a bound cut or set to 0
    "loss",  # weight * (all terms)
)
"""Order of a loss's sums: to be added over micro-batches and data-parallel ranks."""

EXTREMA = ("ratio", "abs_gap")
"""Order of a loss's extrema: largest values, 0 where not measured."""


class NativeTerm(NamedTuple):
    """The compiled form of an objective's own term of a token, and its numbers."""

    kind: LossKind
    low: float = 0.0  # eps_low; tau_negative of sapo
    high: float = 0.0  # eps_high; tau_positive of sapo
    dual_clip: float | None = None


class Correction(NamedTuple):
    """Weights exp(old - rollout) on own terms: of a token or of its response, between bounds."""

    level: CorrectionLevel
    mode: CorrectionMode
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTerms:
    """The terms that every loss of tokens may add to its objective's own one."""

    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    correction: Correction | None = None

    @property
    def needs_responses(self) -> bool:
        """True where the terms of a token depend on all tokens of its response."""
        return self.correction is not None and self.correction.level != "token"


class MeasuredLoss(NamedTuple):
    """A loss of N tokens and its measurements on the way; only the loss has a gradient."""

    loss: "Tensor"  # [], in the dtype that it is computed in
    logprobs: "Tensor"  # [N]; 0 at weight 0
    sums: "Tensor"  # [at least len(SUMS)] float64
    extrema: "Tensor"  # [len(EXTREMA)] float64
    is_of_parts: bool = True
    """The loss and its sums are over this rank's own tokens; else over the whole row, and ranks
    that share its sequences have the same."""
