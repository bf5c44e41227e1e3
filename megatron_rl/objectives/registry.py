"""Every objective that a recipe may name."""

from typing import Annotated, get_args

from pydantic import Field

from megatron_rl.objectives.cispo import Cispo
from megatron_rl.objectives.clipped_ratio import ClippedRatio
from megatron_rl.objectives.dpo import Dpo
from megatron_rl.objectives.gspo import Gspo
from megatron_rl.objectives.likelihood import Likelihood
from megatron_rl.objectives.objective import Objective
from megatron_rl.objectives.sapo import Sapo

AnyObjective = Annotated[
    Likelihood | ClippedRatio | Cispo | Gspo | Sapo | Dpo, Field(discriminator="kind")
]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.model_fields["kind"].default: objective
    for objective in get_args(get_args(AnyObjective)[0])
}
"""kind -> its settings."""
