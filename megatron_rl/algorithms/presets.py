"""An algorithm is (selection, advantage, objective); the named ones are rows of one table."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from megatron_rl.errors import ConfigError


def nearest(name: str, known: Iterable[str]) -> str:
    """The way out for an unknown name: the nearest known one, if any is near, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known)}"


def one_of(field: str, known: Iterable[str]) -> BeforeValidator:
    """A validator that refuses other names for algorithm.<field> and says which is meant."""

    def check(name: object) -> object:
        if isinstance(name, str) and name not in known:
            raise ConfigError(f"algorithm.{field}", name, "is not known", nearest(name, known))
        return name

    return BeforeValidator(check)


_SelectionName = Literal[
    "all",
    "gold",
    "positive",
    "drop_all_wrong",
    "drop_all_correct",
    "drop_uniform",
    "best_of_n",
    "drop_truncated",
    "drop_overlong",
    "best_and_worst",
    "balanced",
]
_AdvantageName = Literal[
    "one",
    "reward",
    "reward_minus_mean",
    "group_norm",
    "reward_over_std",
    "leave_one_out",
    "reward_minus_mean_over_p",
    "batch_norm",
    "gae",
    "preference",
    "distillation",
]
_AggregationName = Literal["sequence_mean", "token_mean", "sequence_sum", "pair_mean"]
SELECTION_NAMES: tuple[_SelectionName, ...] = get_args(_SelectionName)
ADVANTAGE_NAMES: tuple[_AdvantageName, ...] = get_args(_AdvantageName)
SelectionName = Annotated[_SelectionName, one_of("selection", SELECTION_NAMES)]
AdvantageName = Annotated[_AdvantageName, one_of("advantage", ADVANTAGE_NAMES)]
AggregationName = Annotated[
    _AggregationName, one_of("loss_aggregation", get_args(_AggregationName))
]

SIGN_SELECTIONS: frozenset[str] = frozenset(
    {"positive", "drop_all_wrong", "drop_all_correct", "drop_uniform", "balanced"}
)
"""Selections that take a response for correct when its reward is above 0."""

GROUP_RELATIVE: frozenset[AdvantageName] = frozenset(
    {
        "reward_minus_mean",
        "group_norm",
        "reward_over_std",
        "leave_one_out",
        "reward_minus_mean_over_p",
        "batch_norm",
        "preference",
    }
)
"""Advantages that compare a response with the others of its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A row of the table PRESETS, or one with a recipe's changes."""

    selection: tuple[SelectionName, ...]
    advantage: AdvantageName
    objective: str  # a kind of objectives/registry.py
    loss_aggregation: AggregationName = "sequence_mean"

    @property
    def needs_group(self) -> bool:
        """True where it needs two responses of a prompt or more."""
        return self.advantage in GROUP_RELATIVE or "drop_uniform" in self.selection

    @property
    def needs_critic(self) -> bool:
        """True where advantages come from a value model."""
        return self.advantage == "gae"

    @property
    def needs_reward(self) -> bool:
        """False where advantages come from a teacher alone."""
        return self.advantage != "distillation"


def _row(
    selection: SelectionName,
    advantage: AdvantageName,
    objective: str,
    loss_aggregation: AggregationName = "sequence_mean",
) -> Preset:
    return Preset(
        selection=(selection,),
        advantage=advantage,
        objective=objective,
        loss_aggregation=loss_aggregation,
    )


# Source, unless said otherwise: Xiong et al. 2025, arXiv:2504.11343, section 2 and ablations.
PRESETS: dict[str, Preset] = {
    "sft": _row("gold", "one", "likelihood"),
    "raft": _row("positive", "one", "likelihood"),
    "raft_pp": _row("positive", "one", "clipped_ratio"),
    "reinforce": _row("all", "reward", "clipped_ratio"),
    "reinforce_remove_all_wrong": _row("drop_all_wrong", "reward", "clipped_ratio"),
    "reinforce_remove_all_correct": _row("drop_all_correct", "reward", "clipped_ratio"),
    "reinforce_rej": _row("drop_uniform", "reward", "clipped_ratio"),
    "reinforce_rej_norm": _row("drop_uniform", "reward_over_std", "clipped_ratio"),
    "reinforce_mean_zero": _row("all", "reward_minus_mean", "clipped_ratio"),
    "grpo": _row("all", "group_norm", "clipped_ratio"),  # arXiv:2402.03300
    "rloo": _row("all", "leave_one_out", "clipped_ratio"),  # arXiv:2402.14740
    "reinforce_pp_baseline": _row("all", "batch_norm", "clipped_ratio"),  # arXiv:2501.03262
    "dr_grpo": _row("all", "reward_minus_mean", "clipped_ratio", "sequence_sum"),  # 2503.20783
    "ppo": _row("all", "gae", "clipped_ratio"),  # arXiv:1707.06347, 1909.08593
    "dapo": _row("drop_uniform", "group_norm", "clipped_ratio", "token_mean"),  # arXiv:2503.14476
    "reinforce_ada": _row(  # arXiv:2510.04996
        "balanced", "reward_minus_mean_over_p", "clipped_ratio", "token_mean"
    ),
    "cispo": _row("all", "group_norm", "cispo", "token_mean"),  # arXiv:2506.13585
    "gspo": _row("all", "group_norm", "gspo"),  # arXiv:2507.18071
    "sapo": _row("all", "group_norm", "sapo"),  # arXiv:2511.20347
    # Gu et al. 2023, arXiv:2306.08543; Agarwal et al. 2023, arXiv:2306.13649
    "distillation": _row("all", "distillation", "clipped_ratio", "token_mean"),
    "iterative_dpo": _row("best_and_worst", "preference", "dpo", "pair_mean"),  # arXiv:2305.18290
}

NUMBERS: dict[str, dict[str, float]] = {
    "dapo": {"eps_high": 0.28},
    "reinforce_ada": {"eps_high": 0.28},
}
"""Preset -> the settings of its objective that are not that one's defaults."""

ROUNDS: dict[str, dict[str, Any]] = {
    "dapo": {"fill": True},
    "reinforce_ada": {"max_responses": 32, "until_positive": 2, "until_negative": 2},
}
"""Preset -> what it sets of rollout.rounds; a recipe may change each, or set null."""
