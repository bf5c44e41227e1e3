"""The likelihood of responses, each token weighted by its cut ratio, which has no gradient.

Source: MiniMax-M1, arXiv:2506.13585, eq. 4 and 5. So every token keeps a gradient, while the
clipped ratio leaves out those that updates move most, which are the rare ones. The paper sets no
lower bound and gives no number for the upper one.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_rl.objectives.objective import ClipFlags, TokenObjective
from megatron_rl.ops.loss_spec import NativeTerm

if TYPE_CHECKING:
    from torch import Tensor


class Cispo(TokenObjective):
    """-sg(clip(s, 1 - eps_low, 1 + eps_high)) A log pi of each token, s being its ratio."""

    kind: Literal["cispo"] = "cispo"
    has_ratio: ClassVar[bool] = True

    eps_low: float = Field(default=1.0, gt=0, le=1)
    """The weight of a token is at least 1 - eps_low; with 1 there is no lower bound."""

    eps_high: float = Field(default=4.0, gt=0)
    """The weight of a token is at most 1 + eps_high."""

    @property
    def native(self) -> NativeTerm:
        return NativeTerm("cispo", self.eps_low, self.eps_high)

    def own_terms(
        self, logprobs: "Tensor", ratio: "Tensor", advantages: "Tensor"
    ) -> "tuple[Tensor, ClipFlags | None]":
        """Clip counts are of tokens whose weight was cut, whatever their advantage."""
        ratio = ratio.detach()
        low, high = ratio < 1 - self.eps_low, ratio > 1 + self.eps_high
        weight = ratio.clamp(1 - self.eps_low, 1 + self.eps_high)
        return -weight * advantages * logprobs, ClipFlags(low, high, low.new_zeros(low.shape))
