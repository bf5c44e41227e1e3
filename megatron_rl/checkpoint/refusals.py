"""What a run's checkpoints cannot be chosen by."""

from collections.abc import Iterator

from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.errors import ConfigError
from megatron_rl.evaluation.config import EvaluationConfig


def best_problems(
    checkpoint: CheckpointConfig, evaluation: EvaluationConfig
) -> Iterator[ConfigError]:
    """Why no checkpoint could be the best one by the metric that the recipe names."""
    best = checkpoint.keep_best
    if best is None:
        return
    possible = [
        f"evaluation/{name}/{measure}_at_{evaluation.samples}"
        for name in evaluation.benchmarks
        for measure in ("average", "pass", "majority")
    ]
    if best not in possible:
        yield ConfigError(
            "checkpoint.keep_best",
            best,
            "this recipe's evaluations bring no such metric",
            "Set " + " or set ".join(f"checkpoint.keep_best={name}" for name in possible)
            if possible
            else "Set checkpoint.keep_best=null, or name evaluation.benchmarks",
        )
