"""One ratio for a whole response, the geometric mean of its tokens', clipped.

Source: Zheng et al. 2025, arXiv:2507.18071, eq. 5 to 7.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_rl.objectives.clipped_ratio import clipped_terms
from megatron_rl.objectives.objective import ClipFlags, RatioOf, TokenObjective

if TYPE_CHECKING:
    from torch import Tensor


class Gspo(TokenObjective):
    """-min(s A, clip(s, 1 - eps_low, 1 + eps_high) A) of each response, s = exp(mean_t log s_t).

    Each of its tokens has the term of the response, so under sequence_mean the loss is the mean
    over responses. Without a compiled form: the ratio of a response needs all of its tokens.
    """

    kind: Literal["gspo"] = "gspo"
    has_ratio: ClassVar[bool] = True
    ratio_of: ClassVar[RatioOf] = "response"

    eps_low: float = Field(default=3e-4, gt=0, le=1)
    """A ratio under 1 - eps_low earns no further credit."""

    eps_high: float = Field(default=4e-4, gt=0)
    """A ratio over 1 + eps_high earns no further credit."""

    def own_terms(
        self, logprobs: "Tensor", ratio: "Tensor", advantages: "Tensor"
    ) -> "tuple[Tensor, ClipFlags | None]":
        return clipped_terms(ratio, advantages, eps_low=self.eps_low, eps_high=self.eps_high)
