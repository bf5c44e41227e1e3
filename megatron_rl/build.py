"""The composition root: from a config to the parts of a run.

The only file that knows which concrete classes make up a run.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.batching.packer import Packer
from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.config import RunConfig
from megatron_rl.errors import ConfigErrors
from megatron_rl.evaluation.evaluator import Evaluator
from megatron_rl.evaluation.votes import MathEquality
from megatron_rl.megatron.groups import join
from megatron_rl.megatron.transformer_config import DTYPES
from megatron_rl.metrics.rollouts import RolloutLog
from megatron_rl.metrics.timers import PhaseTimer
from megatron_rl.ops import backend
from megatron_rl.ops.config import Backend
from megatron_rl.parallel.collectives import agree_or_raise, same_or_raise
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.platforms.base import Platform
from megatron_rl.policy.critic import Critic
from megatron_rl.policy.passes import plan_passes
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.trainer import Trainer
from megatron_rl.preflight import Inputs
from megatron_rl.reward.scorer import RewardScorer
from megatron_rl.rollout.sampler import Sampler, SamplingPlan
from megatron_rl.rollout.source import GoldRollouts, RolloutSource, SampledRollouts
from megatron_rl.rollout.vllm_engine import VllmEngine
from megatron_rl.run import Run, Sampling
from megatron_rl.weights.sync import WeightSync


def build_run(
    config: RunConfig, inputs: Inputs, platform: Platform, say: Callable[[str], None]
) -> Run:
    """All parts of a run; every rank calls it, after init_distributed."""
    rollout_tp = 1 if config.is_supervised else config.rollout.tensor_model_parallel_size
    groups = join(platform, config.parallel, rollout_tp)
    say(choose_ops(config.ops.backend, groups))
    algorithm = Algorithm(config.algorithm)
    passes = plan_passes(
        algorithm,
        num_updates=config.num_updates,
        epochs=config.optimizer.epochs,
        critic_warmup=config.critic.warmup_updates,
    )
    run_updates = config.run.num_iterations * config.num_updates * config.optimizer.epochs
    policy = build_policy(config, inputs, groups, run_updates)
    keeps_reference = passes.ref or (config.metrics.kl_every and not config.is_supervised)
    reference = policy.snapshot() if keeps_reference else None
    policy.prepare_training()
    critic = _build_critic(config, inputs, groups, run_updates)
    sampling = None if config.is_supervised else _build_sampling(config, inputs, groups)
    output_dir = Path(config.run.output_dir)
    return Run(
        config=config,
        inputs=inputs,
        groups=groups,
        prompts=inputs.prompts,
        policy=policy,
        algorithm=algorithm,
        packer=Packer(
            groups,
            algorithm,
            row_tokens=config.row_tokens,
            row_multiple=groups.layout.tp if config.parallel.sequence_parallel else 1,
            max_response_tokens=config.rollout.max_response_tokens,
            dtype=torch.float64 if policy.dtype == torch.float64 else torch.float32,
        ),
        trainer=Trainer(
            policy,
            algorithm,
            passes,
            epochs=config.optimizer.epochs,
            reference=reference,
            critic=critic,
            critic_config=config.critic,
        ),
        rollouts=_rollout_source(config, groups, sampling),
        sampling=sampling,
        evaluator=build_evaluator(config, inputs, groups) if sampling else None,
        store=CheckpointStore(
            output_dir / "checkpoints", groups, keep_last=config.checkpoint.keep_last
        ),
        timer=PhaseTimer(synchronize=platform.synchronize),
        rollout_log=RolloutLog(config.metrics, output_dir, groups),
        stop=StopRequest(),
        say=say,
    )


def build_policy(config: RunConfig, inputs: Inputs, groups: Groups, run_updates: int) -> Policy:
    """The policy with the weights of model.path; run_updates is how many it will get."""
    policy = Policy(
        inputs.arch,
        config.model,
        config.parallel,
        config.optimizer,
        groups,
        temperature=config.rollout.temperature,
        run_updates=run_updates,
    )
    policy.load(inputs.model)
    return policy


def _build_critic(
    config: RunConfig, inputs: Inputs, groups: Groups, run_updates: int
) -> Critic | None:
    if inputs.critic is None:
        return None
    critic = Critic(
        inputs.arch,
        config.model,
        config.parallel,
        config.critic_optimizer,
        groups,
        run_updates=run_updates,
    )
    critic.load(inputs.critic)
    critic.prepare_training()
    return critic


def choose_ops(choice: Backend, groups: Groups) -> str:
    """Decide which ops run, the same on every rank; returns one line about it. Every rank calls it.

    Raises:
        ConfigErrors: this rank lacks the native ops that were asked for.
        RunError: another rank does, or ranks would run different ones.
    """
    told, error = "", None
    try:
        told = backend.choose(choice, groups.platform.current_device())
    except ConfigErrors as problem:
        error = problem
    agree_or_raise(error, groups.host)
    same_or_raise(
        f"ops.backend={choice}",
        told,
        "ranks that split a vocabulary would wait in different collectives. Install the package "
        "alike on all machines, or set ops.backend=reference",
        groups.host,
    )
    return told


def build_engine(
    config: RunConfig, inputs: Inputs, groups: Groups, *, load_weights: bool
) -> VllmEngine:
    """This rank's part of the rollout engine."""
    evaluation = config.evaluation.max_response_tokens or 0
    longest = config.prompts.max_prompt_tokens + max(config.rollout.max_response_tokens, evaluation)
    return VllmEngine(
        inputs.model_dir,
        inputs.arch,
        config.rollout,
        groups,
        dtype=DTYPES[config.engine_dtype],
        max_model_len=min(longest, inputs.arch.max_position_embeddings),
        eos_ids=inputs.tokenizer.eos_ids,
        load_weights=load_weights,
    )


def build_evaluator(config: RunConfig, inputs: Inputs, groups: Groups) -> Evaluator | None:
    """The recipe's benchmarks, or None."""
    if not config.evaluation.benchmarks:
        return None
    return Evaluator(
        config.evaluation,
        inputs.benchmarks,
        max_response_tokens=config.rollout.max_response_tokens,
        model=config.model.path,
        seed=config.run.seed,
        equality=MathEquality(config.reward.num_workers),
        output_dir=Path(config.run.output_dir),
        groups=groups,
    )


def _build_sampling(config: RunConfig, inputs: Inputs, groups: Groups) -> Sampling:
    scorer = RewardScorer(config.reward)
    engine = build_engine(config, inputs, groups, load_weights=False)
    return Sampling(
        engine=engine,
        sampler=Sampler(engine, inputs.tokenizer, groups, run_seed=config.run.seed),
        scorer=scorer,
        sync=build_sync(config, inputs, groups, engine),
    )


def build_sync(config: RunConfig, inputs: Inputs, groups: Groups, engine: VllmEngine) -> WeightSync:
    """The bridge from the policy's weights to the engine's."""
    dtype = DTYPES[config.engine_dtype]
    return WeightSync(inputs.arch, groups, config.weights, engine.weights, dtype)


def _rollout_source(config: RunConfig, groups: Groups, sampling: Sampling | None) -> RolloutSource:
    if sampling is None:
        return GoldRollouts(groups)
    plan = SamplingPlan(
        purpose="train",
        group_size=config.rollout.group_size,
        temperature=config.rollout.temperature,
        max_response_tokens=config.rollout.max_response_tokens,
    )
    return SampledRollouts(sampling.engine, sampling.sampler, sampling.scorer, plan)
