"""The algorithm section of a recipe: a preset's name, and what to change of it."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from megatron_rl.algorithms.objective_forms import InAnyForm
from megatron_rl.algorithms.presets import (
    PRESETS,
    AdvantageName,
    AggregationName,
    Preset,
    SelectionName,
    one_of,
)
from megatron_rl.errors import ConfigError
from megatron_rl.objectives.correction import RolloutCorrection
from megatron_rl.objectives.registry import AnyObjective
from megatron_rl.ops.loss_spec import KlEstimator, SharedTerms


class AlgorithmConfig(InAnyForm):
    """The responses that are trained on, their advantages, and the loss."""

    preset: Annotated[str, one_of("preset", PRESETS)]
    """Name of a row of the table in algorithms/presets.py, such as raft_pp, reinforce_rej, grpo."""

    selection: tuple[SelectionName, ...] | None = None
    """Selections in place of the preset's, applied in order, each to what those before kept."""

    advantage: AdvantageName | None = None
    """Advantage in place of the preset's."""

    objective: AnyObjective = Field(json_schema_extra={"filled": "default the preset's"})
    """The formula that is minimised, with its settings: {kind: clipped_ratio, eps_low: 0.2}. A kind
    alone takes its defaults, and settings without a kind are those of the preset's kind."""

    loss_aggregation: AggregationName | None = None
    """Aggregation in place of the preset's: sequence_mean (each response counts the same),
    token_mean (each token does), sequence_sum (each response counts by its tokens, over
    max_response_tokens), or pair_mean (each pair of dpo counts the same)."""

    normalize_over: Literal["kept", "collected"] = "kept"
    """Responses that the loss divides by: the kept ones, or all that were sampled and graded."""

    max_per_group: int | None = Field(default=None, ge=1)
    """Most responses of a group that are kept: the first ones that every other selection leaves."""

    balanced_size: int = Field(default=4, ge=2)
    """Responses of a group that the selection balanced keeps: half of them right, half wrong, the
    first ones of each. Where one side has fewer, the other fills up; an odd one is wrong."""

    overlong_tokens: int | None = Field(default=None, ge=1)
    """Limit of the selection drop_overlong, in response tokens."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference policy in the loss; 0 needs no reference pass."""

    kl_estimator: KlEstimator = "k3"
    """Form of that KL: k1 = log pi - log ref, k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1."""

    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    std_ddof: Literal[0, 1] = 1
    """1: sample standard deviation of a group's rewards; 0: population."""

    std_eps: float = Field(default=1e-6, ge=0)
    """Added to a standard deviation before it divides, in reward units."""

    rollout_correction: RolloutCorrection | None = None
    """Weigh tokens by exp(old_logprobs - rollout_logprobs), between bounds; null: do not."""

    distillation_coef: float | None = Field(default=None, ge=0)
    """Added to each token's advantage: this times (log-prob under reference.path - old_logprobs);
    null: 1 under the advantage distillation, which is nothing else, and 0 under any other."""

    gamma: float = Field(default=1.0, gt=0, le=1)
    """gae: discount per token."""

    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """gae: 0 takes one-step differences of values, 1 the whole return minus the value."""

    kl_reward_coef: float = Field(default=0.0, ge=0)
    """gae: each token's reward loses this times (old_logprobs - ref_logprobs)."""

    kl_reward_target: float | None = Field(default=None, gt=0)
    """Adapt that coefficient towards this KL, in nats per response; null: keep it fixed."""

    kl_reward_horizon: int = Field(default=10_000, ge=1)
    """Responses over which an adaptive coefficient reacts."""

    drop_zero_advantage: bool = True
    """Drop kept responses whose advantage is exactly 0 and that no KL or entropy term acts on:
    the gradient stays the same and they cost nothing."""

    train_on_everything: bool = False
    """Run rejected responses through the model at weight 0: same updates, full cost. For measuring
    what rejection saves."""

    @field_validator("selection", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: object) -> object:
        if value in ([], ()):
            raise ConfigError(
                "algorithm.selection",
                value,
                "is empty",
                "Set algorithm.selection=[all], or set algorithm.selection=null",
            )
        return (value,) if isinstance(value, str) else value

    @property
    def resolved(self) -> Preset:
        """The preset's row with this section's changes."""
        row = PRESETS[self.preset]
        return Preset(
            selection=self.selection or row.selection,
            advantage=self.advantage or row.advantage,
            objective=self.objective.kind,
            loss_aggregation=self.loss_aggregation or row.loss_aggregation,
        )

    @property
    def shared_terms(self) -> SharedTerms:
        """The terms that the loss of a token adds to its objective's own one."""
        correction = self.rollout_correction
        return SharedTerms(
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            entropy_coef=self.entropy_coef,
            correction=None if correction is None else correction.term,
        )

    @property
    def distillation_weight(self) -> float:
        """The coefficient of the teacher's part of advantages; 0: there is none."""
        if self.distillation_coef is not None:
            return self.distillation_coef
        return 0.0 if self.resolved.needs_reward else 1.0

    @property
    def has_loss_on_every_token(self) -> bool:
        """True where a token has a gradient whatever its response's advantage: by a KL or entropy
        term, or by the teacher's part.
        """
        return any((self.kl_coef, self.entropy_coef, self.distillation_weight))
