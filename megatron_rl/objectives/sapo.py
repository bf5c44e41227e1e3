"""The ratio of the policy to the one that it started the iteration from, through a soft gate.

Source: Gao et al. 2025, arXiv:2511.20347. In the place of a clip, behind which a token has no
gradient, the gradient falls off evenly on both sides of ratio 1.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_rl.objectives.objective import ClipFlags, TokenObjective
from megatron_rl.ops.loss_spec import NativeTerm

if TYPE_CHECKING:
    from torch import Tensor


class Sapo(TokenObjective):
    """-4 / tau sigmoid(tau (s - 1)) A of each token, s being its ratio.

    tau is tau_positive where A > 0, else tau_negative. At ratio 1 the gradient is that of -s A.
    """

    kind: Literal["sapo"] = "sapo"
    has_ratio: ClassVar[bool] = True

    tau_positive: float = Field(default=1.0, gt=0)
    """Steepness of the gate for tokens of positive advantage."""

    tau_negative: float = Field(default=1.05, gt=0)
    """The same of negative advantage; larger, so that their gradient falls off faster."""

    @property
    def native(self) -> NativeTerm:
        return NativeTerm("sapo", self.tau_negative, self.tau_positive)

    def own_terms(
        self, logprobs: "Tensor", ratio: "Tensor", advantages: "Tensor"
    ) -> "tuple[Tensor, ClipFlags | None]":
        tau = ratio.new_full(ratio.shape, self.tau_negative)
        tau = tau.masked_fill(advantages > 0, self.tau_positive)
        return -(4 / tau) * (tau * (ratio - 1)).sigmoid() * advantages, None
