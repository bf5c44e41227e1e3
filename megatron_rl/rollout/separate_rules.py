"""What ranks that only sample cannot go with."""

import math
from collections.abc import Iterator

from megatron_rl.errors import ConfigError
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.rollout.config import RolloutConfig

SEPARATE, SHARED = "rollout.separate_ranks", "rollout.separate_ranks=0"
ENGINE_SIZE = "rollout.tensor_model_parallel_size"


def separate_problems(
    rollout: RolloutConfig, parallel: ParallelConfig, *, lag: int, has_engine: bool
) -> Iterator[ConfigError]:
    """Why no ranks can only sample, or why a run that needs them has none; lag: run.lag."""
    separate = rollout.separate_ranks
    if not separate:
        if lag:
            yield ConfigError(
                "run.lag",
                lag,
                "ranks that train cannot sample meanwhile, and rollout.separate_ranks is 0",
                f"Set {SEPARATE}=N, the last ranks of the job, or set run.lag=0",
            )
        return
    if not has_engine:
        way_out = f"Set run.lag=0 {SHARED}" if lag else f"Set {SHARED}"
        yield ConfigError(SEPARATE, separate, "no engine samples in this run", way_out)
    elif rollout.engine == "megatron":
        yield ConfigError(
            SEPARATE,
            separate,
            "rollout.engine=megatron is the policy itself, on the ranks that train it",
            "Set rollout.engine=vllm",
        )
    if parallel.auto:
        yield ConfigError(
            "parallel.auto",
            True,
            f"chooses for ranks that train and sample in turns, and {SEPARATE}={separate}",
            f"Set parallel.auto=false, or set run.lag=0 {SHARED}",
        )


def engine_size_problems(rollout: RolloutConfig, world_size: int) -> Iterator[ConfigError]:
    """Why the ranks that sample, of so many that were started, hold no whole engines."""
    size, separate = rollout.tensor_model_parallel_size, rollout.separate_ranks
    if separate >= world_size:
        yield ConfigError(
            SEPARATE,
            separate,
            f"of the {world_size} ranks of this run none is left to train",
            f"Start more ranks, or set run.lag=0 {SHARED}",
        )
        return
    fitting = math.gcd(separate or world_size, size)
    if fitting != size:
        ranks = f"{separate} ranks of {SEPARATE}" if separate else f"{world_size} ranks of this run"
        yield ConfigError(
            ENGINE_SIZE,
            size,
            f"must divide the {ranks}",
            f"Set {ENGINE_SIZE}={fitting}, or another divisor",
        )
