"""A rank that only samples, from a config to its end: an engine, a grader, and nothing trained."""

from collections.abc import Callable

from megatron_rl.build import check_same_prompts
from megatron_rl.build_rollouts import across, bridge, build_sampled, waits
from megatron_rl.config import RunConfig
from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.groups import make_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.sides import Job
from megatron_rl.parallel.stop import DeafToStop
from megatron_rl.parallel.watchdog import Watchdog
from megatron_rl.platforms.base import Platform
from megatron_rl.preflight import Inputs
from megatron_rl.rollout.exchange import Exchange
from megatron_rl.rollout.serving import Serving
from megatron_rl.rollout.vllm_engine import VllmEngine
from megatron_rl.separate import recipe_of_samplers


class SamplingRank:
    """The parts of a rank that only samples."""

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        platform: Platform,
        job: Job,
        watchdog: Watchdog,
        say: Callable[[str], None],
    ) -> None:
        """Build them; every rank of the side calls it, after init_distributed and join_job."""
        check_same_prompts(inputs, job.world)
        groups = make_groups(
            platform,
            Layout(world_size=job.samplers, tp=1, pp=1),
            config.rollout.tensor_model_parallel_size,
            tensor_parallel=None,
            context_parallel=None,
        )
        meter, stop = Meter(groups, watchdog), DeafToStop()
        self._rollouts = build_sampled(
            recipe_of_samplers(config),
            inputs,
            groups,
            meter,
            stop,
            say,
            policy=None,
            shares_device=False,
        )
        engine = self._rollouts.engine
        assert isinstance(engine, VllmEngine)
        self._serving = Serving(
            self._rollouts,
            bridge(config, inputs, across(groups, config, job), engine.weights),
            Exchange(job),
            inputs.prompts,
            groups,
            meter,
            job,
            waits(watchdog),
        )
        stop.listen()

    def serve(self) -> int:
        """Answer the ranks that train until they have done; the exit code of the run."""
        return self._serving.until_left()

    def close(self) -> None:
        """End the engine and the grader."""
        self._rollouts.close()
