"""Settings of an algorithm that cannot work together."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.errors import ConfigError
from megatron_rl.objectives.objective import TokenObjective


def algorithm_problems(config: AlgorithmConfig) -> Iterator[ConfigError]:
    """Everything that is wrong with a section whose settings are right one by one."""
    yield from _without_effect(config)
    yield from _contradictions(config)


@dataclass(frozen=True, kw_only=True)
class _Reach:
    """Settings that act only under a condition."""

    fields: tuple[str, ...]
    acts: Callable[[AlgorithmConfig], bool]
    condition: str
    way_out: str


_REACHES = (
    _Reach(
        fields=("kl_estimator",),
        acts=lambda c: c.kl_coef != 0,
        condition="algorithm.kl_coef=0, so without a KL term",
        way_out="Set algorithm.kl_coef=0.001, or leave it out",
    ),
    _Reach(
        fields=("overlong_tokens",),
        acts=lambda c: "drop_overlong" in c.resolved.selection,
        condition="a selection without drop_overlong",
        way_out="Set algorithm.overlong_tokens=null, or add drop_overlong to algorithm.selection",
    ),
    _Reach(
        fields=("balanced_size",),
        acts=lambda c: "balanced" in c.resolved.selection,
        condition="a selection without balanced",
        way_out="Add balanced to algorithm.selection or leave it out",
    ),
    _Reach(
        fields=("gamma", "gae_lambda", "kl_reward_coef", "kl_reward_target", "kl_reward_horizon"),
        acts=lambda c: c.resolved.needs_critic,
        condition="an advantage other than gae",
        way_out="Set algorithm.preset=ppo, use algorithm.kl_coef, or leave it out",
    ),
    _Reach(
        fields=("kl_reward_target", "kl_reward_horizon"),
        acts=lambda c: c.kl_reward_coef != 0 or not c.resolved.needs_critic,
        condition="algorithm.kl_reward_coef=0, so without anything to adapt",
        way_out="Set algorithm.kl_reward_coef=0.001, or leave it out",
    ),
    _Reach(
        fields=(
            "kl_coef",
            "entropy_coef",
            "rollout_correction",
            "distillation_coef",
            "normalize_over",
            "std_ddof",
        ),
        acts=lambda c: not c.objective.trains_pairs,
        condition="an objective that trains pairs, whose loss is not about tokens",
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
            "Set algorithm.overlong_tokens=N, the limit in tokens",
        )
    if "gold" in row.selection and (
        row.advantage != "one"
        or config.rollout_correction is not None
        or config.distillation_weight
    ):
        yield ConfigError(
            "algorithm.selection",
            list(row.selection),
            "gold responses have neither a reward nor rollout_logprobs, and were not sampled",
            "Set algorithm.advantage=one and algorithm.rollout_correction=null and "
            "algorithm.distillation_coef=null",
        )
    yield from _pair_contradictions(config)
    yield from _token_contradictions(config)
    mixed_only = "drop_uniform" in row.selection or (
        {"drop_all_wrong", "drop_all_correct"} <= set(row.selection)
    )
    without_all = tuple(name for name in row.selection if name != "all")
    if row.advantage == "reward_over_std" and not mixed_only:
        yield ConfigError(
            "algorithm.advantage",
            row.advantage,
            "a group of equal rewards has std 0, so its advantages would be reward / std_eps",
            f"Set algorithm.selection=[{','.join(('drop_uniform', *without_all))}]",
        )
    if config.train_on_everything and config.has_loss_on_every_token:
        yield ConfigError(
            "algorithm.train_on_everything",
            True,
            "a KL or entropy term, or a teacher, would act on kept responses only, so nothing is "
            "compared",
            "Set algorithm.train_on_everything=false",
        )
    if config.train_on_everything and row.advantage in ("batch_norm", "gae"):
        yield ConfigError(
            "algorithm.train_on_everything",
            True,
            "whitening over the batch would give rejected responses an advantage",
            "Set algorithm.train_on_everything=false, or choose another algorithm.advantage",
        )


def _token_contradictions(config: AlgorithmConfig) -> Iterator[ConfigError]:
    """What does not go with advantages of tokens: a critic's, or a teacher's part."""
    row, objective = config.resolved, config.objective
    if row.advantage == "distillation" and not config.distillation_weight:
        yield ConfigError(
            "algorithm.distillation_coef",
            config.distillation_coef,
            "algorithm.advantage=distillation is nothing else, so all advantages would be 0",
            "Set algorithm.distillation_coef=1, or choose another algorithm.advantage",
        )
    is_named = row.needs_critic or row.advantage == "distillation"
    if objective.trains_pairs or not (is_named or config.distillation_weight):
        return
    setting, value = "distillation_coef", f"{config.distillation_weight:g}"
    if is_named:
        setting, value = "advantage", row.advantage
    if not objective.has_ratio:
        yield ConfigError(
            f"algorithm.{setting}",
            value,
            f"advantages per token need an objective with a ratio, {row.objective} has none",
            "Set algorithm.objective=clipped_ratio",
        )
    if isinstance(objective, TokenObjective) and objective.ratio_of == "response":
        yield ConfigError(
            f"algorithm.{setting}",
            value,
            f"gives every token an advantage, and {objective.kind} a response one ratio",
            "Set algorithm.objective=clipped_ratio",
        )


def _pair_contradictions(config: AlgorithmConfig) -> Iterator[ConfigError]:
    """The four settings that make pairs come together or not at all."""
    row = config.resolved
    ways = {
        "objective": config.objective.trains_pairs,
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
    if config.objective.trains_pairs and (
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
