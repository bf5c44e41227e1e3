"""Settings of the correction for what the engine samples from and what the trainer scores.

The two compute the same model with other kernels, and the engine's numbers are those that chose the
tokens. Weights exp(old_logprobs - rollout_logprobs) make up for it, within bounds.
"""

from typing import Self

from pydantic import Field, model_validator

from megatron_rl.errors import ConfigError
from megatron_rl.ops.loss_spec import Correction, CorrectionLevel, CorrectionMode
from megatron_rl.settings import Settings

DEFAULT_HIGH: dict[CorrectionLevel, float] = {"token": 2.0, "sequence": 2.0, "geometric": 1.001}


class RolloutCorrection(Settings):
    """The weight of a token's own term, and its bounds; KL and entropy are not weighed.

    Without the section no term is weighed.
    """

    level: CorrectionLevel = "token"
    """token: by the token's own ratio; sequence: by the product over its response; geometric: by
    that product's mean power, so that long responses are not weighed worse."""

    mode: CorrectionMode = "truncate"
    """truncate: a weight outside of the bounds becomes the bound; mask: it becomes 0, so the token,
    or at the other levels the response, leaves the loss."""

    low: float = Field(default=0.0, ge=0)
    """Lower bound of the weight; 0: none."""

    high: float | None = Field(default=None, gt=0)
    """Upper bound of the weight; null: 2.0, under geometric 1.001."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.low > self.term.high:
            raise ConfigError(
                "algorithm.rollout_correction.low",
                self.low,
                f"is above the upper bound, rollout_correction.high={self.term.high:g}",
                f"Set algorithm.rollout_correction.low={self.term.high:g}, or raise the other",
            )
        return self

    @property
    def term(self) -> Correction:
        """As the losses take it."""
        high = DEFAULT_HIGH[self.level] if self.high is None else self.high
        return Correction(self.level, self.mode, self.low, high)
