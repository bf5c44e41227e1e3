"""The rules of the section reward, each a ConfigError where it is broken.

They take values and not the section, which calls them and so cannot stand below them.
"""

import re
from collections.abc import Collection

from megatron_rl.errors import ConfigError

VERIFIERS = ("math", "exact", "number", "format")
"""Rewards that give a verdict, by name."""

MAX_REWARD = 1e9  # a group's variance is a sum of squares in float32, which ends at 3.4e38

_PART_NAME = re.compile(r"[a-z][a-z0-9_]*")


def is_import_path(text: str) -> bool:
    """True where it reads package.module:function."""
    module, colon, function = text.partition(":")
    parts = [*module.split("."), *function.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def check_kind(kind: str, function: str | None) -> None:
    if kind not in (*VERIFIERS, "function") and not is_import_path(kind):
        raise ConfigError(
            "reward.kind",
            kind,
            rule=f"must be {', '.join(VERIFIERS)}, function or an import path "
            "package.module:function",
            way_out="Set reward.kind=math for the mathematics verifier",
        )
    if kind == "function" and function is None:
        raise ConfigError(
            "reward.kind",
            kind,
            rule="needs the function to call",
            way_out="Set reward.function=package.module:function",
        )
    if kind != "function" and function is not None:
        raise ConfigError(
            "reward.function",
            function,
            rule=f"has no effect while reward.kind={kind!r}",
            way_out="Set reward.kind=function, or set reward.function=null",
        )
    if function is not None and not is_import_path(function):
        raise ConfigError(
            "reward.function",
            function,
            rule="must be an import path package.module:function",
            way_out="Write the module as in an import statement, a colon, the function's name",
        )


def check_part(name: str, kind: str, free_tokens: int | None, max_tokens: int | None) -> None:
    where = f"reward.parts.{name}"
    if not _PART_NAME.fullmatch(name):
        raise ConfigError(
            "reward.parts",
            name,
            rule="a part's name becomes a metric's: lower-case letters, digits and underscores",
            way_out="Rename it",
        )
    if kind not in (*VERIFIERS, "length_penalty") and not is_import_path(kind):
        raise ConfigError(
            f"{where}.kind",
            kind,
            rule=f"must be {', '.join(VERIFIERS)}, length_penalty or an import path "
            "package.module:function",
            way_out=f"Name the part after its kind, or set {where}.kind=KIND",
        )
    limits = (free_tokens, max_tokens)
    is_range = free_tokens is not None and max_tokens is not None and free_tokens < max_tokens
    if kind != "length_penalty" and limits != (None, None):
        raise ConfigError(
            f"{where}.free_tokens, max_tokens",
            limits,
            rule="only length_penalty reads them",
            way_out="Leave them out",
        )
    if kind == "length_penalty" and not is_range:
        raise ConfigError(
            f"{where}.free_tokens, max_tokens",
            limits,
            rule="length_penalty needs both, the first below the second",
            way_out="For a limit of 4096 tokens: 3072 and 4096",
        )


def check_effects(kinds: Collection[str], tolerance: float, answer_in: str) -> None:
    if tolerance and "number" not in kinds:
        raise ConfigError(
            "reward.tolerance",
            tolerance,
            rule="only the kind number reads it",
            way_out="Set reward.kind=number, or set reward.tolerance=0",
        )
    if answer_in != "box" and not set(kinds) & set(VERIFIERS):
        raise ConfigError(
            "reward.answer_in",
            answer_in,
            rule="has no effect: a function gets the whole response",
            way_out="Set reward.answer_in=box",
        )
    if answer_in == "response" and "format" in kinds:
        raise ConfigError(
            "reward.answer_in",
            answer_in,
            rule="names no form that the kind format could look for",
            way_out="Set reward.answer_in=box, or set reward.answer_in=answer_tag, or set "
            "reward.answer_in=answer_line",
        )


def check_rewards(correct: float, wrong: float) -> None:
    if correct <= wrong:
        raise ConfigError(
            "reward.correct",
            correct,
            rule=f"must be greater than reward.wrong={wrong!r}, or training unlearns",
            way_out="Set reward.correct=1 and reward.wrong=-1, or set reward.correct=1 and "
            "reward.wrong=0",
        )


def check_limits(
    num_workers: int, deadline_s: float, memory_mib: int, max_failure_frac: float
) -> None:
    if not 1 <= num_workers <= 1024:
        raise ConfigError(
            "reward.num_workers",
            num_workers,
            rule="must be at least 1 and at most 1024: each is a process of its own on every rank",
            way_out="Set reward.num_workers=2, or set reward.num_workers=1 where cores are scarce",
        )
    if not 0.05 <= deadline_s <= 3600:
        raise ConfigError(
            "reward.deadline_s",
            deadline_s,
            rule="must be at least 0.05 and at most 3600: CPU time is measured in steps of 0.01 s, "
            "and nobody waits longer than an hour for one response",
            way_out="Set reward.deadline_s=1: the slowest honest mathematics pair takes 0.4 s",
        )
    if not 256 <= memory_mib <= 2**24:
        raise ConfigError(
            "reward.memory_mib",
            memory_mib,
            rule="must be at least 256 and at most 2**24: a worker with sympy loaded needs about "
            "128, and no machine has 16 TiB for one",
            way_out="Set reward.memory_mib=1024, or more for a function that loads large libraries",
        )
    if not 0 <= max_failure_frac <= 1:
        raise ConfigError(
            "reward.max_failure_frac",
            max_failure_frac,
            rule="must be a share between 0 and 1",
            way_out="Set reward.max_failure_frac=0.01 to stop at 1%, or set "
            "reward.max_failure_frac=1 to never stop",
        )
