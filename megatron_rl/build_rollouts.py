"""The rollouts of a run, from its config: engines and graders here, or the way to those apart."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from megatron_rl.config import RunConfig
from megatron_rl.evaluation.evaluator import Evaluator
from megatron_rl.evaluation.votes import MathEquality
from megatron_rl.megatron.transformer_config import DTYPES
from megatron_rl.memory import longest_in_engine
from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.layout import EngineLayout
from megatron_rl.parallel.sides import Job
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.parallel.watchdog import Watchdog
from megatron_rl.policy.offload import OffloadedTrainer
from megatron_rl.policy.policy import Policy
from megatron_rl.preflight import Inputs
from megatron_rl.reward.scorer import RewardScorer
from megatron_rl.rollout.apart import RolloutsApart
from megatron_rl.rollout.engine import Engine
from megatron_rl.rollout.exchange import Exchange
from megatron_rl.rollout.gold import GoldRollouts
from megatron_rl.rollout.group_rules import most_prompts, most_responses
from megatron_rl.rollout.kv_cache import policy_state_bytes, policy_token_bytes
from megatron_rl.rollout.megatron_engine import MegatronEngine
from megatron_rl.rollout.record import ReplayedRollouts
from megatron_rl.rollout.rollouts import Rollouts
from megatron_rl.rollout.rounds import Rounds, RoundsPlan
from megatron_rl.rollout.sampled import SampledRollouts
from megatron_rl.rollout.sampler import Sampler
from megatron_rl.rollout.vllm_engine import VllmEngine
from megatron_rl.types import Draw
from megatron_rl.weights.sync import EngineWeights, NoEngine, WeightSync

DEFAULT_GAP = {"float64": 1e-3, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Default of rollout.max_logprob_gap by the engine's dtype, in nats."""


def build_rollouts(
    config: RunConfig,
    inputs: Inputs,
    groups: Groups,
    job: Job | None,
    meter: Meter,
    stop: StopRequest,
    say: Callable[[str], None],
    policy: Policy,
    trainer: OffloadedTrainer,
    watchdog: Watchdog | None,
) -> Rollouts:
    """Those of a rank that trains."""
    if config.has_engine_beside:
        return build_sampled(
            config, inputs, groups, meter, stop, say, policy=policy, trainer=trainer
        )
    if config.has_engine:
        assert job is not None
        return _build_apart(config, inputs, groups, job, meter, say, watchdog)
    if config.debug.replay is None:
        return GoldRollouts(groups, meter)
    return ReplayedRollouts(
        Path(config.debug.replay),
        groups,
        meter,
        reward_parts=tuple(config.reward.parts),
        rounds=rounds_plan(config, inputs),
        more=inputs.prompts.more,
        with_experts=config.rollout.routing_replay,
        with_support=config.rollout.is_truncated,
    )


def rounds_plan(config: RunConfig, inputs: Inputs) -> RoundsPlan | None:
    rollout, wanted = config.rollout, config.prompts.prompts_per_iteration
    if rollout.rounds is None:
        return None
    return RoundsPlan(
        config=rollout.rounds,
        group_size=rollout.group_size,
        max_responses=most_responses(rollout),
        num_wanted=wanted,
        max_prompts=max(wanted, min(most_prompts(rollout.rounds, wanted), len(inputs.prompts))),
    )


def largest_gap(config: RunConfig) -> float:
    """Largest difference that the engine probe lets pass, in nats."""
    return config.rollout.max_logprob_gap or DEFAULT_GAP[config.engine_dtype]


def bridge(config: RunConfig, inputs: Inputs, groups: Groups, engine: EngineWeights) -> WeightSync:
    """The way of the weights to the engines; every rank of the groups makes one."""
    return WeightSync(inputs.arch, groups, config.weights, engine, DTYPES[config.engine_dtype])


def across(groups: Groups, config: RunConfig, job: Job) -> Groups:
    """Groups of one side with those over both in the place of its own, as the bridge takes them."""
    return replace(
        groups,
        layout=config.layout_of(job.side.job_size),
        engines=EngineLayout(
            world_size=job.samplers,
            tp=config.rollout.tensor_model_parallel_size,
            first=job.side.trainers,
        ),
        rank=job.side.job_rank,
        world=job.world,
        bridge=job.bridge,
        nodes=job.nodes,
    )


def waits(watchdog: Watchdog | None) -> Callable[[], AbstractContextManager[None]]:
    """The context of a rank that waits for the other side."""
    return nullcontext if watchdog is None else watchdog.waiting


def _build_apart(
    config: RunConfig,
    inputs: Inputs,
    groups: Groups,
    job: Job,
    meter: Meter,
    say: Callable[[str], None],
    watchdog: Watchdog | None,
) -> RolloutsApart:
    both = across(groups, config, job)
    assert isinstance(both.engines, EngineLayout)
    return RolloutsApart(
        job,
        Exchange(job),
        bridge(config, inputs, both, NoEngine()),
        inputs.prompts,
        groups,
        meter,
        engines=both.engines,
        rounds=rounds_plan(config, inputs),
        reward=config.reward,
        lag=config.run.lag,
        num_iterations=config.run.num_iterations,
        max_logprob_gap=largest_gap(config),
        say=say,
        waiting=waits(watchdog),
    )


def build_engine(
    config: RunConfig, inputs: Inputs, groups: Groups, *, load_weights: bool
) -> VllmEngine:
    """This rank's part of vLLM."""
    rollout = config.rollout
    if rollout.kv_cache_mib is None:
        rollout = rollout.model_copy(update={"kv_cache_mib": inputs.kv_cache_mib})
    return VllmEngine(
        inputs.model_dir,
        inputs.arch,
        rollout,
        groups,
        dtype=DTYPES[config.engine_dtype],
        max_model_len=longest_in_engine(config, inputs.arch),
        eos_ids=inputs.tokenizer.eos_ids,
        load_weights=load_weights,
    )


def policy_as_engine(
    config: RunConfig, inputs: Inputs, groups: Groups, policy: Policy
) -> MegatronEngine:
    """This rank's part of the policy, as the engine."""
    rollout, platform = config.rollout, groups.platform
    share = rollout.gpu_memory_utilization * platform.total_memory_bytes()
    mib = rollout.kv_cache_mib or inputs.kv_cache_mib
    return MegatronEngine(
        policy,
        groups,
        eos_ids=inputs.tokenizer.eos_ids,
        max_model_len=longest_in_engine(config, inputs.arch),
        max_num_seqs=rollout.max_num_seqs,
        cache_bytes=share if mib is None else mib << 20,
        token_bytes=policy_token_bytes(inputs.arch, groups.layout, itemsize=policy.dtype.itemsize),
        state_bytes=policy_state_bytes(inputs.arch, groups.layout, itemsize=policy.dtype.itemsize),
    )


def _build_evaluator(config: RunConfig, inputs: Inputs, groups: Groups) -> Evaluator:
    """The recipe's benchmarks, of which there may be none."""
    return Evaluator(
        config.evaluation,
        {name: benchmark.questions for name, benchmark in inputs.benchmarks.items()},
        max_response_tokens=config.rollout.max_response_tokens,
        model=config.model.path,
        seed=config.run.seed,
        asked=inputs.asked(config),
        equality=MathEquality(config.reward.num_workers),
        output_dir=Path(config.run.output_dir),
        groups=groups,
    )


def build_sampled(
    config: RunConfig,
    inputs: Inputs,
    groups: Groups,
    meter: Meter,
    stop: StopRequest,
    say: Callable[[str], None],
    *,
    policy: Policy | None,
    trainer: OffloadedTrainer | None = None,
    shares_device: bool = True,
) -> SampledRollouts:
    """The engine and all that hangs on it.

    Args:
        policy: whose weights it samples with. None: vLLM reads model.path itself.
        trainer: on the same device; it leaves while the engine is built, which then sleeps until
            the first weights come.
        shares_device: False where nothing is trained on these ranks; then others send the weights.
    """
    trainer = trainer or OffloadedTrainer("none", [], groups)
    scorer = RewardScorer(config.reward)
    trainer.leaves()
    engine: Engine
    sync = None
    if config.has_vllm:
        engine = build_engine(config, inputs, groups, load_weights=policy is None and shares_device)
        if shares_device:
            sync = bridge(config, inputs, groups, engine.weights)
    else:
        assert policy is not None
        engine = policy_as_engine(config, inputs, groups, policy)
    if trainer.offload != "none":
        engine.sleep()
    sampler = Sampler(
        engine, inputs.tokenizer, groups, run_seed=config.run.seed, progress=meter.progress
    )
    draw = Draw(
        purpose="train",
        group_size=config.rollout.group_size,
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
    )
    plan = rounds_plan(config, inputs)
    return SampledRollouts(
        engine=engine,
        sampler=sampler,
        scorer=scorer,
        sync=sync,
        evaluator=_build_evaluator(config, inputs, groups),
        reward=config.reward,
        draw=draw,
        rounds=None
        if plan is None
        else Rounds(
            plan=plan,
            draw=draw,
            sampler=sampler,
            scorer=scorer,
            stop=stop,
            world=groups.world,
            more=inputs.prompts.more,
            say=say,
        ),
        trainer=trainer,
        shares_device=shares_device,
        max_logprob_gap=largest_gap(config),
        groups=groups,
        meter=meter,
        stop=stop,
        say=say,
    )
