"""Direct preference optimization: the log-odds by which the right response of a pair wins.

loss = sum_p weight_p * -log sigmoid(beta * margin_p),
margin_p = sum over the preferred response of (logprobs - ref_logprobs), less the other's.

Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
"""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from megatron_rl.objectives.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rl.types import LossTokens

PAIR_SUMS = ("pairs", "preferred", "margin")
"""Order of the sums: pairs, pairs with a positive margin, and margins in nats."""


class Dpo(Objective):
    """-log sigmoid(beta * margin) of each pair of responses."""

    kind: Literal["dpo"] = "dpo"
    trains_pairs: ClassVar[bool] = True

    beta: float = Field(default=0.1, gt=0)
    """How strongly the policy is tied to its reference."""

    reference: Literal["initial", "previous_iteration"] = "initial"
    """The reference: the initial policy, or the one that sampled this iteration."""

    @property
    def needs_old_logprobs(self) -> bool:
        return self.reference == "previous_iteration"

    @property
    def needs_ref_logprobs(self) -> bool:
        return self.reference == "initial"

    def pair_loss(
        self, logprobs: "Tensor", tokens: "LossTokens", pair_of: "Tensor", num_pairs: int
    ) -> "tuple[Tensor, Tensor]":
        """Weighted loss [] of the pairs that N tokens belong to, and PAIR_SUMS [3] float64.

        Args:
            logprobs: [N] current, with gradient.
            tokens: advantages are +1 on tokens of the preferred response and -1 on the other's;
                weights hold the pair's share of the global loss on each of its tokens. The
                reference is ref_logprobs, else old_logprobs; with neither every margin is exactly
                0.
            pair_of: [N] int64, below num_pairs; both responses of a pair are here.
            num_pairs: may be 0: the loss is then 0, connected to logprobs.
        """
        from torch.nn.functional import softplus

        ref = tokens.old_logprobs if tokens.ref_logprobs is None else tokens.ref_logprobs
        ref = logprobs.detach() if ref is None else ref.to(logprobs.dtype)
        zeros = logprobs.new_zeros(num_pairs)
        margins = zeros.index_add(
            0, pair_of, tokens.advantages.to(logprobs.dtype) * (logprobs - ref)
        )
        weight_of_pair = zeros.index_copy(0, pair_of, tokens.weights.to(logprobs.dtype))
        loss = (weight_of_pair * softplus(-self.beta * margins)).sum()
        wins = margins.detach().double()
        sums = wins.new_zeros(len(PAIR_SUMS))
        sums[0], sums[1], sums[2] = num_pairs, (wins > 0).sum(), wins.sum()
        return loss, sums


def pair_metrics(sums: "Tensor") -> dict[str, float]:
    """Named metrics of accumulated PAIR_SUMS [3]; {} without pairs."""
    pairs, preferred, margin = sums.tolist()
    if not pairs:
        return {}
    return {
        "policy/pairs": pairs,
        "policy/pairs_preferred_frac": preferred / pairs,
        "policy/pair_margin_mean": margin / pairs,
    }
