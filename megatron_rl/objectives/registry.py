"""Every objective that a recipe may name."""

from typing import Annotated, get_args

from pydantic import Field

from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.dpo import Dpo
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.objective import Objective

AnyObjective = Annotated[Likelihood | ClippedRatio | Dpo, Field(discriminator="kind")]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.model_fields["kind"].default: objective
    for objective in get_args(get_args(AnyObjective)[0])
}
"""kind -> its settings."""
