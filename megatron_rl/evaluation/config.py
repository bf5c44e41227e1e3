"""Settings of the evaluation on held-out questions."""

import re
from typing import Self

from pydantic import Field, model_validator

from megatron_rl.errors import ConfigError
from megatron_rl.settings import Settings

_NAME = re.compile(r"(?!overall$)\w[\w.-]*")


class BenchmarkConfig(Settings):
    """One benchmark: a set of questions with answers."""

    path: str
    """Its data set, named as in prompts.path."""

    split: str = "test"
    """Its split, as in prompts.split."""

    prompt_key: str | None = None
    """Column with the question, as in prompts.prompt_key."""

    answer_key: str | None = None
    """Column with the answer, as in prompts.answer_key."""

    max_problems: int | None = Field(default=None, gt=0)
    """Only the first so many questions are asked; None: all."""


class EvaluationConfig(Settings):
    """Average@k and its relatives on benchmarks, by the rollout engine and the run's own reward."""

    benchmarks: dict[str, BenchmarkConfig] = Field(default_factory=dict)
    """Name -> benchmark. A name is part of file names; "overall" is the name of their average."""

    samples: int = Field(default=16, ge=1, le=2**16)
    """k: the number of responses to each question, which are held and measured at once."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature, within vLLM's bounds: 0, or 0.01 to 2. 0 is greedy, and then one
    response per question is enough."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """As rollout.top_p; it needs a top_k, too."""

    top_k: int = Field(default=-1, ge=-1, le=2**20)
    """As rollout.top_k, which it does not follow."""

    max_response_tokens: int | None = Field(default=None, gt=0, le=2**24)
    """Longest response, in tokens; None: the same as rollout.max_response_tokens. A response also
    ends where the model's positions end, and then counts as truncated."""

    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Confidence of the intervals around every result."""

    resamples: int = Field(default=2000, ge=1, le=10**6)
    """Number of sets of questions that are drawn for the intervals; all are held at once."""

    every: int = Field(default=0, ge=0)
    """Iterations between evaluations during training; 0: none."""

    at_start: bool = False
    """Evaluate before the first update."""

    at_end: bool = False
    """Evaluate after the last update."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in self.benchmarks:
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    "evaluation.benchmarks",
                    name,
                    rule="must be made of letters, digits, _ . - and must not be overall",
                    way_out="Give the benchmark another name",
                )
        return self
