"""How responses are verified, and what a verdict is worth."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_rl.errors import ConfigError
from megatron_rl.settings import Settings

VERIFIERS = ("math", "exact", "number", "format")
"""Rewards that give a verdict, by name."""

_PART_NAME = re.compile(r"[a-z][a-z0-9_]*")


class PartConfig(Settings):
    """One more reward, added to the verdict's: weight times a value."""

    kind: str | None = None
    """A verifier's name (value 1 if it says correct, else 0), "length_penalty" (value 0 to -1), or
    the import path of a function as in reward.function (value between -1 and 1; True is 1). None:
    the part's own name."""

    weight: float
    """What a value of 1 adds to the reward; negative takes away."""

    free_tokens: int | None = Field(default=None, ge=0)
    """length_penalty: responses up to this many tokens have value 0."""

    max_tokens: int | None = Field(default=None, ge=1)
    """length_penalty: the value falls evenly from free_tokens on, to -1 here and beyond."""

    def ends(self, name: str) -> tuple[float, float]:
        """The least and the most that a part of this name adds to a reward."""
        kind = self.kind or name
        values = (0, 1) if kind in VERIFIERS else (-1, 0) if kind == "length_penalty" else (-1, 1)
        ends = [self.weight * value for value in values]
        return min(ends), max(ends)


class RewardConfig(Settings):
    """The verifier, its rewards, and the limits of its worker processes."""

    kind: str = "math"
    """What gives the verdict. "math": the answer equals the gold one; "exact": it is the same text,
    white space aside; "number": it is a number within `tolerance`; "format": there is an answer
    where `answer_in` says; "function": the user's function named by `function`. An import path
    "package.module:function" here means the same at once."""

    function: str | None = None
    """The import path "package.module:function" of `fn(response, answer) -> bool | float`. True and
    False earn `correct` and `wrong`; a float is the reward itself, counted as correct from
    `correct` on. It runs in the workers, must take any two strings, and is called once with dummy
    ones before the run starts."""

    answer_in: Literal["box", "answer_tag", "response"] = "box"
    """Where the answer stands: in the last \\boxed{}, between the last <answer> and </answer>, or
    anywhere: then the response as a whole, and for "number" the last number of it."""

    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """Relative error that "number" lets pass, for data sets that publish one."""

    parts: dict[str, PartConfig] = Field(default_factory=dict)
    """More rewards, by the name under which they are logged. The verdict is not theirs."""

    correct: float = 1.0
    """Reward of a correct response."""

    wrong: float = -1.0
    """Reward of a wrong response and of one without an answer. A response whose verification failed
    (timeout, error) has no reward and is left out of the update."""

    num_workers: int = 2
    """Worker processes per rank, for each reward that needs any."""

    deadline_s: float = 1.0
    """CPU seconds one response may take, from the start of its execution; 20 times as many seconds
    of wall time end it too. Past that its verdict is `timeout`."""

    memory_mib: int = 1024
    """Address space of one worker. A verifier that wants more gets the verdict `error`."""

    max_failure_frac: float = 0.01
    """The largest share of an iteration's responses that may end in `timeout` or `error`; above it
    the run stops."""

    @property
    def function_path(self) -> str | None:
        """Import path of the user's function, None for a verifier of ours."""
        return self.kind if ":" in self.kind else self.function

    @property
    def kinds(self) -> dict[str, str]:
        """What is computed of every response: setting -> kind, the verdict's first."""
        parts = {f"reward.parts.{name}": part.kind or name for name, part in self.parts.items()}
        return {"reward.kind": self.function_path or self.kind, **parts}

    @property
    def bounds(self) -> tuple[float, float]:
        """What a correct response earns at least, and a wrong one at most.

        Not for a function that returns floats: it sets the reward itself.
        """
        ends = [part.ends(name) for name, part in self.parts.items()]
        return self.correct + sum(low for low, _ in ends), self.wrong + sum(
            high for _, high in ends
        )

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind not in (*VERIFIERS, "function") and not is_import_path(self.kind):
            raise ConfigError(
                "reward.kind",
                self.kind,
                rule=f"must be {', '.join(VERIFIERS)}, function or an import path "
                "package.module:function",
                way_out="Leave it out for the mathematics verifier",
            )
        if self.kind == "function" and self.function is None:
            raise ConfigError(
                "reward.kind",
                self.kind,
                rule="needs the function to call",
                way_out="Set reward.function=package.module:function",
            )
        if self.kind != "function" and self.function is not None:
            raise ConfigError(
                "reward.function",
                self.function,
                rule=f"has no effect while reward.kind={self.kind!r}",
                way_out="Set reward.kind=function, or leave reward.function out",
            )
        if self.function is not None and not is_import_path(self.function):
            raise ConfigError(
                "reward.function",
                self.function,
                rule="must be an import path package.module:function",
                way_out="Write the module as in an import statement, a colon, the function's name",
            )
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        for name, part in self.parts.items():
            _check_part(name, part)
        return self

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        kinds = set(self.kinds.values())
        if self.tolerance and "number" not in kinds:
            raise ConfigError(
                "reward.tolerance",
                self.tolerance,
                rule="only the kind number reads it",
                way_out="Set reward.kind=number, or leave it out",
            )
        if self.answer_in != "box" and not kinds & set(VERIFIERS):
            raise ConfigError(
                "reward.answer_in",
                self.answer_in,
                rule="has no effect: a function gets the whole response",
                way_out="Leave it out",
            )
        if self.answer_in == "response" and "format" in kinds:
            raise ConfigError(
                "reward.answer_in",
                self.answer_in,
                rule="names no form that the kind format could look for",
                way_out="Set box or answer_tag",
            )
        return self

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        if self.correct <= self.wrong:
            raise ConfigError(
                "reward.correct",
                self.correct,
                rule=f"must be greater than reward.wrong={self.wrong!r}, or training unlearns",
                way_out="Keep the defaults 1.0 and -1.0, or use 1.0 and 0.0",
            )
        return self

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.num_workers < 1:
            raise ConfigError(
                "reward.num_workers",
                self.num_workers,
                rule="must be at least 1, since responses are verified in worker processes",
                way_out="Use 1 where cores are scarce; 2 is enough for mathematics",
            )
        if self.deadline_s < 0.05:
            raise ConfigError(
                "reward.deadline_s",
                self.deadline_s,
                rule="must be at least 0.05, since CPU time is measured in steps of 0.01 s",
                way_out="The slowest honest mathematics pair takes 0.4 s; keep the default 1.0",
            )
        if self.memory_mib < 256:
            raise ConfigError(
                "reward.memory_mib",
                self.memory_mib,
                rule="must be at least 256, since a worker with sympy loaded needs about half",
                way_out="Keep the default 1024; raise it for a function that loads large libraries",
            )
        if not 0 <= self.max_failure_frac <= 1:
            raise ConfigError(
                "reward.max_failure_frac",
                self.max_failure_frac,
                rule="must be a share between 0 and 1",
                way_out="Use 0.01 to stop at 1%, 1 to never stop",
            )
        return self


def is_import_path(text: str) -> bool:
    """Whether it reads package.module:function."""
    module, colon, function = text.partition(":")
    parts = [*module.split("."), *function.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def _check_part(name: str, part: PartConfig) -> None:
    where, kind = f"reward.parts.{name}", part.kind or name
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
            way_out="Name the part after its kind, or set its kind",
        )
    limits = (part.free_tokens, part.max_tokens)
    if kind != "length_penalty" and limits != (None, None):
        raise ConfigError(
            f"{where}.free_tokens, max_tokens",
            limits,
            rule="only length_penalty reads them",
            way_out="Leave them out",
        )
    if kind == "length_penalty" and (None in limits or limits[0] >= limits[1]):  # type: ignore[operator]
        raise ConfigError(
            f"{where}.free_tokens, max_tokens",
            limits,
            rule="length_penalty needs both, the first below the second",
            way_out="For a limit of 4096 tokens: 3072 and 4096",
        )
