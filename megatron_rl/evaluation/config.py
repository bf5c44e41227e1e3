"""What is measured on held-out problems."""

from pydantic import Field

from megatron_rl.settings import Settings


class BenchmarkConfig(Settings):
    """One set of problems."""

    path: str
    """As prompts.path."""

    split: str = "test"
    """As prompts.split."""

    prompt_key: str = "prompt"
    """As prompts.prompt_key."""

    answer_key: str = "answer"
    """As prompts.answer_key."""

    max_problems: int | None = Field(default=None, gt=0)
    """Only the first so many; None: all."""


class EvaluationConfig(Settings):
    """Average@k over benchmarks, by the rollout engine and the run's own reward."""

    benchmarks: dict[str, BenchmarkConfig] = Field(default_factory=dict)
    """Name -> problems."""

    samples: int = Field(default=16, ge=1)
    """k: responses per problem."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy, and then one response per problem says it all."""

    max_response_tokens: int | None = Field(default=None, gt=0)
    """None: as rollout.max_response_tokens."""

    every: int = Field(default=0, ge=0)
    """Iterations between evaluations during training; 0: none."""

    at_start: bool = False
    """Evaluate before the first update."""

    at_end: bool = False
    """Evaluate after the last update."""
