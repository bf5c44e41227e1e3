"""The likelihood of responses, weighted by their advantages.

Source: Xiong et al. 2025, arXiv:2504.11343, section 2 (RAFT), whose advantages are 1.
"""

from typing import TYPE_CHECKING, Literal

from megatron_rl.objectives.objective import ClipFlags, TokenObjective
from megatron_rl.ops.loss_spec import NativeTerm

if TYPE_CHECKING:
    from torch import Tensor


class Likelihood(TokenObjective):
    """-A log pi of each token."""

    kind: Literal["likelihood"] = "likelihood"

    @property
    def native(self) -> NativeTerm:
        return NativeTerm(kind="likelihood")

    def own_terms(
        self, logprobs: "Tensor", ratio: "Tensor", advantages: "Tensor"
    ) -> "tuple[Tensor, ClipFlags | None]":
        return -advantages * logprobs, None
