"""The ratio of the policy to the one that it started the iteration from, clipped.

Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual_clip: Ye et al. 2019, arXiv:1912.09729,
eq. 5; an eps_high of its own: Yu et al. 2025, arXiv:2503.14476, section 3.1.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_rl.objectives.objective import ClipFlags, TokenObjective
from megatron_rl.ops.loss_spec import NativeTerm

if TYPE_CHECKING:
    from torch import Tensor


class ClippedRatio(TokenObjective):
    """-min(s A, clip(s, 1 - eps_low, 1 + eps_high) A) of each token, s being its ratio."""

    kind: Literal["clipped_ratio"] = "clipped_ratio"
    has_ratio: ClassVar[bool] = True

    eps_low: float = Field(default=0.2, gt=0, le=1)
    """A ratio under 1 - eps_low earns no further credit."""

    eps_high: float = Field(default=0.2, gt=0)
    """A ratio over 1 + eps_high earns no further credit."""

    dual_clip: float | None = Field(default=None, gt=1)
    """A token of negative advantage A costs at most -dual_clip * A, however large its ratio."""

    @property
    def native(self) -> NativeTerm:
        return NativeTerm("clipped_ratio", self.eps_low, self.eps_high, self.dual_clip)

    def own_terms(
        self, logprobs: "Tensor", ratio: "Tensor", advantages: "Tensor"
    ) -> "tuple[Tensor, ClipFlags | None]":
        return clipped_terms(
            ratio,
            advantages,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            dual_clip=self.dual_clip,
        )


def clipped_terms(
    ratio: "Tensor",
    advantages: "Tensor",
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None = None,
) -> "tuple[Tensor, ClipFlags]":
    """The formula written by cases, so that the gradient is exactly that of the case; [N] each."""
    high = (advantages > 0) & (ratio > 1 + eps_high)
    low = (advantages < 0) & (ratio < 1 - eps_low)
    bounded = ratio.masked_fill(high, 1 + eps_high).masked_fill(low, 1 - eps_low)
    dual = low.new_zeros(low.shape)
    if dual_clip is not None:
        dual = (advantages < 0) & (ratio > dual_clip)
        bounded = bounded.masked_fill(dual, dual_clip)
    return -bounded * advantages, ClipFlags(low, high, dual)
