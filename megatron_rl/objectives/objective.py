"""The base of objectives: a section of a recipe that knows its formula and what it needs.

Recipes are read without torch, so this file and those of the objectives import it for type
checking only.
"""

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from megatron_rl.ops.loss_spec import NativeTerm
from megatron_rl.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


RatioOf = Literal["token", "response"]


class Objective(Settings):
    """The settings of an objective, and its needs of the run; each has a file of its own."""

    kind: str
    has_ratio: ClassVar[bool] = False  # of the current policy to the one before the iteration
    trains_pairs: ClassVar[bool] = False  # its loss joins two responses of a group

    @property
    def needs_old_logprobs(self) -> bool:
        """True where the loss uses them; in the first update on fresh rollouts they may be None."""
        return self.has_ratio

    @property
    def needs_ref_logprobs(self) -> bool:
        """True where its own term uses those of the initial policy."""
        return False


class ClipFlags(NamedTuple):
    """Flags of the tokens that each bound stopped, [N] bool."""

    low: "Tensor"
    high: "Tensor"
    dual: "Tensor"


class TokenObjective(Objective):
    """An objective whose loss is a sum over tokens.

    Each needs nothing of others but the ratio of its response, where that is the ratio.
    """

    ratio_of: ClassVar[RatioOf] = "token"

    @property
    def native(self) -> NativeTerm | None:
        """The compiled form of own_terms; None: there is none, and the definition runs."""
        return None

    def own_terms(
        self, logprobs: "Tensor", ratio: "Tensor", advantages: "Tensor"
    ) -> "tuple[Tensor, ClipFlags | None]":
        """[N] own term of each token, to be minimised, and the tokens that its bounds stopped.

        Args:
            logprobs: [N] current, with gradient.
            ratio: [N] exp(logprobs - old_logprobs), with gradient and bounded; of a response the
                exponential of the mean over its tokens.
            advantages: [N] constants.
        """
        raise NotImplementedError
