"""The algorithm section of a recipe: a preset's name, and what to change of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

from pydantic import Field, field_validator, model_validator

from megatron_rl.algorithms.presets import (
    ADVANTAGE_NAMES,
    AGGREGATION_NAMES,
    OBJECTIVE_NAMES,
    PRESETS,
    SELECTION_NAMES,
    AdvantageName,
    AggregationName,
    ObjectiveName,
    Preset,
    SelectionName,
    nearest,
)
from megatron_rl.errors import ConfigError, ConfigErrors
from megatron_rl.settings import Settings


class AlgorithmConfig(Settings):
    """Which responses are trained on, with which advantage, under which loss."""

    preset: str
    """Name of a row of the table in algorithms/presets.py, such as raft_pp, reinforce_rej, grpo."""

    selection: tuple[str, ...] | None = None
    """Instead of the preset's: names, applied in order, each to what the ones before kept."""

    advantage: str | None = None
    """Instead of the preset's."""

    objective: str | None = None
    """Instead of the preset's: likelihood, clipped_ratio or dpo."""

    loss_aggregation: str | None = None
    """Instead of the preset's: sequence_mean (each response counts the same), token_mean (each
    token), or sequence_sum (tokens over max_response_tokens)."""

    normalize_over: Literal["kept", "collected"] = "kept"
    """What the loss divides by: kept responses, or all that were sampled and graded."""

    max_per_group: int | None = Field(default=None, ge=1)
    """At most so many responses of a group, the first ones, after every other selection."""

    overlong_tokens: int | None = Field(default=None, ge=1)
    """Limit of the selection drop_overlong, in response tokens."""

    eps_low: float = Field(default=0.2, gt=0, le=1)
    """A ratio under 1 - eps_low earns no further credit."""

    eps_high: float = Field(default=0.2, gt=0)
    """A ratio over 1 + eps_high earns no further credit."""

    dual_clip: float | None = Field(default=None, gt=1)
    """A token of negative advantage A costs at most -dual_clip * A, however large its ratio."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL to the reference policy in the loss; 0 needs no reference pass."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Form of that KL: k1 = log pi - log ref, k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1."""

    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    std_ddof: Literal[0, 1] = 1
    """1: sample standard deviation of a group's rewards; 0: population."""

    std_eps: float = Field(default=1e-6, ge=0)
    """Added to a standard deviation before it divides, in reward units."""

    rollout_is_cap: float | None = Field(default=None, gt=0)
    """Weigh tokens by exp(old_logprobs - rollout_logprobs), at most this; null: do not."""

    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token of gae."""

    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """0: one-step differences of values; 1: the whole return less the value."""

    kl_reward_coef: float = Field(default=0.0, ge=0)
    """Under gae: each token's reward loses this times log pi_old - log ref."""

    kl_reward_target: float | None = Field(default=None, gt=0)
    """Adapt that coefficient towards this KL, in nats per response; null: keep it fixed."""

    kl_reward_horizon: int = Field(default=10_000, ge=1)
    """Responses over which an adaptive coefficient reacts."""

    dpo_beta: float = Field(default=0.1, gt=0)
    """How strongly dpo ties the policy to its reference."""

    dpo_reference: Literal["initial", "previous_iteration"] = "initial"
    """The reference of dpo: the initial policy, or the one that sampled this iteration."""

    drop_zero_advantage: bool = True
    """Drop kept responses whose advantage is exactly 0 and that no KL or entropy term acts on:
    the gradient stays the same and they cost nothing."""

    train_on_everything: bool = False
    """Run rejected responses through the model at weight 0: same gradient, full cost. For
    measuring what rejection saves."""

    @field_validator("selection", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("preset")
    @classmethod
    def _preset_is_known(cls, name: str) -> str:
        return _known("preset", name, tuple(PRESETS))

    @field_validator("selection")
    @classmethod
    def _selections_are_known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names == ():
            raise ConfigError("algorithm.selection", names, "is empty", "Write [all] or null")
        return names and tuple(_known("selection", name, SELECTION_NAMES) for name in names)

    @field_validator("advantage")
    @classmethod
    def _advantage_is_known(cls, name: str | None) -> str | None:
        return name and _known("advantage", name, ADVANTAGE_NAMES)

    @field_validator("objective")
    @classmethod
    def _objective_is_known(cls, name: str | None) -> str | None:
        return name and _known("objective", name, OBJECTIVE_NAMES)

    @field_validator("loss_aggregation")
    @classmethod
    def _aggregation_is_known(cls, name: str | None) -> str | None:
        return name and _known("loss_aggregation", name, AGGREGATION_NAMES)

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "AlgorithmConfig":
        problems = [*_without_effect(self), *_contradictions(self)]
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise ConfigErrors([str(problem) for problem in problems])
        return self

    @property
    def resolved(self) -> Preset:
        """The preset's row with this section's changes."""
        row = PRESETS[self.preset]
        return Preset(
            selection=cast("tuple[SelectionName, ...] | None", self.selection) or row.selection,
            advantage=cast("AdvantageName | None", self.advantage) or row.advantage,
            objective=cast("ObjectiveName | None", self.objective) or row.objective,
            loss_aggregation=cast("AggregationName | None", self.loss_aggregation)
            or row.loss_aggregation,
        )

    @property
    def has_loss_on_every_token(self) -> bool:
        """Whether a token of advantage 0 has a gradient: under a KL or an entropy term."""
        return self.kl_coef != 0 or self.entropy_coef != 0


def _known(field: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ConfigError(f"algorithm.{field}", name, "is not known", nearest(name, known))
    return name


@dataclass(frozen=True, kw_only=True)
class _Reach:
    """Settings that act only under a condition."""

    fields: tuple[str, ...]
    acts: Callable[[AlgorithmConfig], bool]
    condition: str
    way_out: str


_REACHES = (
    _Reach(
        fields=("eps_low", "eps_high", "dual_clip"),
        acts=lambda c: c.resolved.objective == "clipped_ratio",
        condition="an objective other than clipped_ratio, which has no ratio",
        way_out="Set algorithm.objective=clipped_ratio or leave it out",
    ),
    _Reach(
        fields=("kl_estimator",),
        acts=lambda c: c.kl_coef != 0,
        condition="algorithm.kl_coef=0, so without a KL term",
        way_out="Set algorithm.kl_coef > 0 or leave it out",
    ),
    _Reach(
        fields=("overlong_tokens",),
        acts=lambda c: "drop_overlong" in c.resolved.selection,
        condition="a selection without drop_overlong",
        way_out="Add drop_overlong to algorithm.selection or leave it out",
    ),
    _Reach(
        fields=("gamma", "gae_lambda", "kl_reward_coef", "kl_reward_target", "kl_reward_horizon"),
        acts=lambda c: c.resolved.needs_critic,
        condition="an advantage other than gae",
        way_out="Set algorithm.advantage=gae, use algorithm.kl_coef, or leave it out",
    ),
    _Reach(
        fields=("kl_reward_target", "kl_reward_horizon"),
        acts=lambda c: c.kl_reward_coef != 0 or not c.resolved.needs_critic,
        condition="algorithm.kl_reward_coef=0, so without anything to adapt",
        way_out="Set algorithm.kl_reward_coef > 0 or leave it out",
    ),
    _Reach(
        fields=("dpo_beta", "dpo_reference"),
        acts=lambda c: c.resolved.trains_pairs,
        condition="an objective other than dpo",
        way_out="Set algorithm.objective=dpo or leave it out",
    ),
    _Reach(
        fields=("kl_coef", "entropy_coef", "rollout_is_cap", "normalize_over", "std_ddof"),
        acts=lambda c: not c.resolved.trains_pairs,
        condition="objective=dpo, whose loss is about pairs",
        way_out="Leave it out",
    ),
)


def _without_effect(config: AlgorithmConfig) -> Iterator[ConfigError]:
    for reach in _REACHES:
        for name in reach.fields:
            value = getattr(config, name)
            if value != AlgorithmConfig.model_fields[name].default and not reach.acts(config):
                yield ConfigError(
                    f"algorithm.{name}", value, f"has no effect under {reach.condition}",
                    reach.way_out,
                )  # fmt: skip


def _contradictions(config: AlgorithmConfig) -> Iterator[ConfigError]:
    row = config.resolved
    if config.overlong_tokens is None and "drop_overlong" in row.selection:
        yield ConfigError(
            "algorithm.selection",
            list(row.selection),
            "drop_overlong needs a limit",
            "Set algorithm.overlong_tokens",
        )
    if "gold" in row.selection and (row.advantage != "one" or config.rollout_is_cap is not None):
        yield ConfigError(
            "algorithm.selection",
            list(row.selection),
            "gold responses have neither a reward nor rollout_logprobs",
            "Set algorithm.advantage=one and algorithm.rollout_is_cap=null",
        )
    yield from _pair_contradictions(config)
    mixed_only = "drop_uniform" in row.selection or (
        {"drop_all_wrong", "drop_all_correct"} <= set(row.selection)
    )
    if row.advantage == "reward_over_std" and not mixed_only:
        yield ConfigError(
            "algorithm.advantage",
            row.advantage,
            "a group of equal rewards has std 0, so its advantages would be reward / std_eps",
            "Add drop_uniform to algorithm.selection",
        )
    if config.train_on_everything and config.has_loss_on_every_token:
        yield ConfigError(
            "algorithm.train_on_everything",
            True,
            "a KL or entropy term would act on kept responses only, so nothing is compared",
            "Set algorithm.kl_coef=0 and algorithm.entropy_coef=0",
        )
    if config.train_on_everything and row.advantage in ("batch_norm", "gae"):
        yield ConfigError(
            "algorithm.train_on_everything",
            True,
            "whitening over the batch would give rejected responses an advantage",
            "Set another algorithm.advantage",
        )
    if row.needs_critic and row.objective != "clipped_ratio":
        yield ConfigError(
            "algorithm.advantage",
            "gae",
            f"advantages per token need a loss that uses them, objective is {row.objective}",
            "Set algorithm.objective=clipped_ratio",
        )


def _pair_contradictions(config: AlgorithmConfig) -> Iterator[ConfigError]:
    """The four settings that make pairs come together or not at all."""
    row = config.resolved
    ways = {
        "objective": row.objective == "dpo",
        "selection": "best_and_worst" in row.selection,
        "advantage": row.advantage == "preference",
        "loss_aggregation": row.loss_aggregation == "pair_mean",
    }
    if any(ways.values()) and not all(ways.values()):
        name = next(name for name, is_pair in ways.items() if not is_pair)
        yield ConfigError(
            f"algorithm.{name}",
            getattr(row, name),
            "objective=dpo, selection best_and_worst, advantage=preference and "
            "loss_aggregation=pair_mean only work together",
            "Set algorithm.preset=iterative_dpo",
        )
    if row.trains_pairs and (
        row.selection[-1] != "best_and_worst"
        or config.max_per_group is not None
        or config.train_on_everything
    ):
        yield ConfigError(
            "algorithm.selection",
            list(row.selection),
            "nothing may take a pair apart: best_and_worst must come last, without max_per_group "
            "and train_on_everything",
            "Reorder it, or leave those out",
        )
