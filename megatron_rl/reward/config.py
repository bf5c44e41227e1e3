"""How responses are verified, and what a verdict is worth."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_rl.reward.checks import (
    MAX_REWARD,
    VERIFIERS,
    check_effects,
    check_kind,
    check_limits,
    check_part,
    check_rewards,
)
from megatron_rl.settings import Settings


class PartConfig(Settings):
    """One more reward, added to the verdict's: weight times a value."""

    kind: str | None = None
    """A verifier's name (value 1 if it says correct, else 0), "length_penalty" (value 0 to -1), or
    the import path of a function as in reward.function (value between -1 and 1; True is 1). None:
    the part's own name."""

    weight: float = Field(ge=-MAX_REWARD, le=MAX_REWARD)
    """Reward that a value of 1 adds; a negative weight takes away."""

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
    """How the verdict is found. "math": the answer equals the gold one; "exact": it is the same
    text, white space aside; "number": it is a number within `tolerance`; "format": there is an
    answer where `answer_in` says; "function": the user's function named by `function`. An import
    path "package.module:function" is short for "function" and that path."""

    function: str | None = None
    """The import path "package.module:function" of `fn(response, answer) -> bool | float`. True and
    False earn `correct` and `wrong`; a float is the reward itself, between -1e9 and 1e9, counted as
    correct from `correct` on. Scalars of NumPy count as Python's. It runs in the workers, must take
    any two strings, and is called with dummy responses before the run starts: one that fails on all
    of them is refused."""

    answer_in: Literal["box", "answer_tag", "answer_line", "response"] = "box"
    """Place of the answer: in the last \\boxed{}, between the last <answer> and </answer>, behind
    "Answer:" on the last line that begins with it, or anywhere: then the response as a whole, and
    for "number" the last number of it. The prompt has to ask for that form."""

    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """Relative error that "number" lets pass, for data sets that publish one."""

    parts: dict[str, PartConfig] = Field(default_factory=dict)
    """More rewards, by the name under which they are logged. The verdict is not theirs."""

    correct: float = Field(default=1.0, ge=-MAX_REWARD, le=MAX_REWARD)
    """Reward of a correct response."""

    wrong: float = Field(default=-1.0, ge=-MAX_REWARD, le=MAX_REWARD)
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
        """Setting -> kind of every reward that is computed, the verdict's first."""
        parts = {f"reward.parts.{name}": part.kind or name for name, part in self.parts.items()}
        return {"reward.kind": self.function_path or self.kind, **parts}

    @property
    def bounds(self) -> tuple[float, float]:
        """The least that a correct response earns, and the most that a wrong one does.

        Not for a function that returns floats: it sets the reward itself.
        """
        ends = [part.ends(name) for name, part in self.parts.items()]
        return self.correct + sum(low for low, _ in ends), self.wrong + sum(
            high for _, high in ends
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_kind(self.kind, self.function)
        for name, part in self.parts.items():
            check_part(name, part.kind or name, part.free_tokens, part.max_tokens)
        check_effects(self.kinds.values(), self.tolerance, self.answer_in)
        check_rewards(self.correct, self.wrong)
        check_limits(self.num_workers, self.deadline_s, self.memory_mib, self.max_failure_frac)
        return self
