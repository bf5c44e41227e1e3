"""The forms in which a recipe may name its objective, brought into one: a mapping with its kind.

A bare name stands for the mapping of that kind with its defaults, and a mapping without a kind is
about the preset's objective. Settings that used to stand flat in the section still work, with a
notice that says what to write instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from omegaconf import OmegaConf
from pydantic import ModelWrapValidatorHandler, PrivateAttr, model_validator

from megatron_rl.algorithms.presets import NUMBERS, PRESETS, nearest
from megatron_rl.errors import ConfigError, ConfigErrors
from megatron_rl.objectives.objective import Objective
from megatron_rl.objectives.registry import OBJECTIVES
from megatron_rl.settings import Settings

OBJECTIVE = "algorithm.objective"

FLAT = {
    "eps_low": ("clipped_ratio", "eps_low"),
    "eps_high": ("clipped_ratio", "eps_high"),
    "dual_clip": ("clipped_ratio", "dual_clip"),
    "dpo_beta": ("dpo", "beta"),
    "dpo_reference": ("dpo", "reference"),
}
"""Former key of the section -> kind of objective, and key of its settings."""

CAP = "rollout_is_cap"
"""Former key of the upper bound of rollout_correction, of which it was all there was."""


def overlaid(below: Any, above: Any) -> Any:
    """One layer of a recipe over another: section by section, key by key.

    Settings of an objective are joined where it is of the same kind. Another kind, or a bare name,
    replaces what is below; without a kind that is the preset's.
    """
    merged = OmegaConf.merge(below, above)
    lower, upper = OmegaConf.select(below, OBJECTIVE), OmegaConf.select(above, OBJECTIVE)
    if not isinstance(upper, Mapping) or not isinstance(lower, str | Mapping):
        return merged
    settings = {"kind": lower} if isinstance(lower, str) else dict(lower)
    kind = settings.get("kind", _kind_under(OmegaConf.select(below, "algorithm.preset")))
    is_other = upper.get("kind", kind) != kind
    joint = dict(upper) if is_other else settings | dict(upper)
    OmegaConf.update(merged, OBJECTIVE, joint, merge=False)
    return merged


def joined(overrides: Sequence[str]) -> Any:
    """All overrides as one layer, in their order; a bare objective is the kind of its settings."""
    layer: Any = OmegaConf.create()
    for text in overrides:
        value: Any = OmegaConf.from_dotlist([text])
        objective = OmegaConf.select(value, OBJECTIVE)
        if isinstance(objective, str):
            value = OmegaConf.from_dotlist([f"{OBJECTIVE}.kind={objective}"])
        layer = OmegaConf.merge(layer, value)
    return layer


class InAnyForm(Settings):
    """The base of a section whose objective, and what used to stand flat, comes in any form."""

    _notices: tuple[str, ...] = PrivateAttr(default=())

    @model_validator(mode="wrap")
    @classmethod
    def _in_nested_form(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            return handler(values)
        values, notices = in_nested_form(values)
        config = handler(values)
        config._notices = notices
        return config

    @property
    def notices(self) -> tuple[str, ...]:
        """One line for each setting that goes away, with what to write instead."""
        return self._notices


def in_nested_form(section: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The section with its objective as a mapping with a kind; one notice for each flat key.

    Raises:
        ConfigErrors: an unknown kind, or flat keys that clash with the objective.
    """
    values = {name: value for name, value in section.items() if name not in FLAT}
    values, told = _with_correction(values)
    objective = values.get("objective")
    if isinstance(objective, Objective):
        objective = objective.model_dump()
    if isinstance(objective, str):
        objective = {"kind": objective}
    if objective is None:
        objective = {}
    if not isinstance(objective, Mapping):
        return values, told  # the type check explains it
    kind = _kind_of(objective, section.get("preset"))
    if kind is None:  # the preset's name is wrong, which is told elsewhere
        return values | {"objective": {"kind": "likelihood"}}, told
    moved, notices, problems = _moved(section, kind, objective)
    if problems:
        raise ConfigErrors([str(problem) for problem in problems])
    preset = section.get("preset")
    numbers = NUMBERS.get(str(preset), {}) if kind == _kind_under(preset) else {}
    joint = {"kind": kind, **numbers, **moved, **objective}
    return values | {"objective": joint}, (*told, *notices)


def _with_correction(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The section with rollout_correction in the place of its former key, and the notice of it."""
    if CAP not in values:
        return values, ()
    cap = values.pop(CAP)
    if values.get("rollout_correction") is not None:
        raise ConfigError(
            f"algorithm.{CAP}", cap, "stands beside algorithm.rollout_correction", "Keep the latter"
        )
    if cap is None:
        return values, (f"algorithm.{CAP} goes away: leave it out",)
    notice = f"algorithm.{CAP} goes away: write algorithm.rollout_correction.high={cap}"
    return values | {"rollout_correction": {"high": cap}}, (notice,)


def _kind_of(objective: Mapping[str, Any], preset: Any) -> str | None:
    kind = objective.get("kind")
    if kind is None:
        return _kind_under(preset)
    if not isinstance(kind, str) or kind not in OBJECTIVES:
        raise ConfigError(
            "algorithm.objective", kind, "is not known", nearest(str(kind), OBJECTIVES)
        )
    return kind


def _kind_under(preset: Any) -> str | None:
    return PRESETS[preset].objective if isinstance(preset, str) and preset in PRESETS else None


def _moved(
    section: Mapping[str, Any], kind: str, objective: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], list[ConfigError]]:
    moved: dict[str, Any] = {}
    notices, problems = [], []
    for flat, (owner, name) in FLAT.items():
        if flat not in section:
            continue
        value, path = section[flat], f"algorithm.objective.{name}"
        if name in objective and owner == kind:
            problems.append(
                ConfigError(f"algorithm.{flat}", value, f"stands beside {path}", "Keep the latter")
            )
        elif owner == kind:
            moved[name] = value
            notices.append(
                f"algorithm.{flat} goes away: write {path}={'null' if value is None else value}"
            )
        elif value == OBJECTIVES[owner].model_fields[name].default:
            notices.append(f"algorithm.{flat} goes away: leave it out, {kind} has no {name}")
        else:
            problems.append(
                ConfigError(
                    f"algorithm.{flat}",
                    value,
                    f"has no effect under an objective other than {owner}",
                    f"Set algorithm.objective={owner} or leave it out",
                )
            )
    return moved, notices, problems
