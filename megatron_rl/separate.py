"""The recipe as it is for ranks that only sample, and where no rank only samples."""

from megatron_rl.config import RunConfig
from megatron_rl.parallel.config import ParallelConfig


def in_turns(config: RunConfig) -> RunConfig:
    """The recipe with every rank sampling and training in turns."""
    rollout = config.rollout.model_copy(update={"separate_ranks": 0})
    run = config.run.model_copy(update={"lag": 0})
    return config.model_copy(update={"rollout": rollout, "run": run})


def recipe_of_samplers(config: RunConfig) -> RunConfig:
    """What is left of the recipe on ranks that only sample: engines, and nothing that is cut."""
    return in_turns(config).model_copy(update={"parallel": ParallelConfig()})
