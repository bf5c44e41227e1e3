"""How responses are verified, and what a verdict is worth."""

from typing import Self

from pydantic import model_validator

from megatron_rl.errors import ConfigError
from megatron_rl.settings import Settings


class RewardConfig(Settings):
    """The verifier, its rewards, and the limits of its worker processes."""

    kind: str = "math"
    """"math": the last box of the response against the answer; "function": the user's function
    named by `function`. An import path "package.module:function" here means the same at once."""

    function: str | None = None
    """The import path "package.module:function" of `fn(response, answer) -> bool | float`. True and
    False earn `correct` and `wrong`; a float is the reward itself, counted as correct from
    `correct` on. It runs in the workers, must take any two strings, and is called once with dummy
    ones before the run starts."""

    correct: float = 1.0
    """Reward of a correct response."""

    wrong: float = -1.0
    """Reward of a wrong response and of one without an answer. A response whose verification failed
    (timeout, error) has no reward and is left out of the update."""

    num_workers: int = 2
    """Worker processes per rank."""

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
        """Import path of the user's function, None for the mathematics verifier."""
        return self.kind if ":" in self.kind else self.function

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind not in ("math", "function") and not _is_import_path(self.kind):
            raise ConfigError(
                "reward.kind",
                self.kind,
                rule="must be math, function or an import path package.module:function",
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
        if self.function is not None and not _is_import_path(self.function):
            raise ConfigError(
                "reward.function",
                self.function,
                rule="must be an import path package.module:function",
                way_out="Write the module as in an import statement, a colon, the function's name",
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


def _is_import_path(text: str) -> bool:
    module, colon, function = text.partition(":")
    parts = [*module.split("."), *function.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)
