"""The composition root: from a config to the parts of a run.

No other file knows which concrete classes make up a run.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.algorithms.selector import Selector
from megatron_rl.batching.packer import Packer
from megatron_rl.build_rollouts import build_rollouts
from megatron_rl.checkpoint.due import SaveTimes
from megatron_rl.checkpoint.names import CHECKPOINTS
from megatron_rl.checkpoint.store import CheckpointStore
from megatron_rl.config import RunConfig
from megatron_rl.errors import ConfigErrors
from megatron_rl.megatron.groups import join
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.metrics.meter import Meter
from megatron_rl.metrics.profiler import Profiler
from megatron_rl.metrics.rollouts import RolloutLog
from megatron_rl.metrics.start_times import StartTimes
from megatron_rl.ops import backend
from megatron_rl.ops.config import Backend
from megatron_rl.parallel.collectives import agree_or_raise, same_or_raise
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.sides import Job
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.parallel.watchdog import Watchdog
from megatron_rl.platforms.base import Platform
from megatron_rl.policy.before_selection import BeforeSelection
from megatron_rl.policy.critic import Critic
from megatron_rl.policy.offload import OffloadedTrainer
from megatron_rl.policy.passes import plan_passes
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.reference import FirstWeights, OtherModel, Reference
from megatron_rl.policy.trainer import Trainer
from megatron_rl.preflight import Inputs
from megatron_rl.rollout.record import RolloutRecord
from megatron_rl.run import Run


def build_run(
    config: RunConfig,
    inputs: Inputs,
    platform: Platform,
    say: Callable[[str], None],
    watchdog: Watchdog | None = None,
    times: StartTimes | None = None,
    job: Job | None = None,
) -> Run:
    """All parts of a run on a rank that trains; every such rank calls it, after init_distributed.

    job: with its ranks on two sides; None: every rank trains and samples.
    """
    groups = join(platform, config.parallel, config.engine_tp)
    check_same_prompts(inputs, groups.world if job is None else job.world)
    ops = choose_ops(config.ops.backend, groups)
    output_dir = Path(config.run.output_dir)
    profiler = Profiler(config.run.profile, output_dir, groups, say, watchdog)
    meter = Meter(groups, watchdog, profiler)
    algorithm = Algorithm(config.algorithm)
    passes = plan_passes(algorithm, **config.steps_of_iteration)
    policy = build_policy(config, inputs, groups, config.most_steps)
    # Where all responses go through the reference pass, the loss or the reward measures this KL.
    refers_to_first = passes.ref and inputs.reference is None
    is_measured_anyway = refers_to_first and algorithm.choice.selection == ("all",)
    kl_every = 0 if config.is_supervised or is_measured_anyway else config.metrics.kl_every
    initial = policy.snapshot() if kl_every or refers_to_first else None
    policy.prepare_training()
    critic = _build_critic(config, inputs, groups, config.most_steps)
    reference = _build_reference(config, inputs, policy, initial) if passes.ref else None
    packer = _build_packer(config, algorithm, groups, policy.dtype, meter)
    stop, away = StopRequest(), _offloaded(config, policy, critic, reference)
    (times or StartTimes()).end("model")
    return Run(
        config=config,
        inputs=inputs,
        groups=groups,
        ops=ops,
        meter=meter,
        profiler=profiler,
        prompts=inputs.prompts,
        rollouts=build_rollouts(
            config, inputs, groups, job, meter, stop, say, policy, away, watchdog
        ),
        rollout_log=RolloutLog(config.metrics, output_dir, groups),
        record=RolloutRecord(output_dir, groups, num_iterations=config.debug.record),
        selector=_build_selector(config, algorithm, groups, meter),
        packer=packer,
        policy=policy,
        trainer=Trainer(
            policy,
            algorithm,
            passes,
            meter.report,
            epochs=config.optimizer.epochs,
            reference=reference,
            critic=critic,
            critic_config=config.critic,
        ),
        before_selection=BeforeSelection(
            policy,
            packer,
            initial,
            meter.report,
            config.metrics,
            kl_every=kl_every,
            most_each=config.rollout.group_size if config.rollout.rounds else None,
        ),
        store=CheckpointStore(output_dir / CHECKPOINTS, groups, config.checkpoint),
        saves=SaveTimes(config=config.checkpoint),
        stop=stop,
        say=say,
    )


def check_same_prompts(inputs: Inputs, world: dist.ProcessGroup) -> None:
    """Raise RunError unless all ranks read the same prompts; every rank of world calls it."""
    same_or_raise(
        "checksum of the prompts in use",
        inputs.prompts.state_dict()["checksum"],
        "ranks would train on different prompts. Give all machines the same files; a gold answer "
        "that takes about reward.deadline_s to compare may count as too slow on one rank alone, so "
        "raise that or leave such rows out",
        world,
    )


def _offloaded(
    config: RunConfig, policy: Policy, critic: Critic | None, reference: Reference | None
) -> OffloadedTrainer:
    models: list[TrainedModel] = [policy]
    if critic is not None:
        models.append(critic)
    if isinstance(reference, OtherModel):
        models.append(reference.model)
    device_type = policy.groups.platform.device_type
    return OffloadedTrainer(config.offload_on(device_type), models, policy.groups)


def _build_selector(
    config: RunConfig, algorithm: Algorithm, groups: Groups, meter: Meter
) -> Selector:
    rounds = config.rollout.rounds
    fills = rounds is not None and rounds.fill
    return Selector(
        algorithm=algorithm,
        world=groups.world,
        prompts_per_update=config.optimizer.prompts_per_update,
        num_mixed=config.prompts.prompts_per_iteration if fills else None,
        run_seed=config.run.seed,
        report=meter.report,
    )


def _build_packer(
    config: RunConfig, algorithm: Algorithm, groups: Groups, dtype: torch.dtype, meter: Meter
) -> Packer:
    """The packer of samples; a policy of 16 bits has its loss in float32, too."""
    return Packer(
        groups,
        algorithm,
        row_tokens=config.row_tokens,
        row_multiple=groups.layout.row_multiple(
            sequence_parallel=config.parallel.sequence_parallel
        ),
        max_response_tokens=config.rollout.max_response_tokens,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        share_prompts=config.shares_prompts_on(groups.platform.device_type),
        report=meter.report,
    )


def build_policy(config: RunConfig, inputs: Inputs, groups: Groups, run_updates: int) -> Policy:
    """The policy with the weights of model.path, for a run of at most run_updates updates."""
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


def _build_reference(
    config: RunConfig, inputs: Inputs, policy: Policy, initial: dict[str, torch.Tensor] | None
) -> Reference:
    if inputs.reference is None:
        assert initial is not None
        return FirstWeights(policy, initial)
    source, arch = inputs.reference
    model = Policy(
        arch,
        config.model,
        config.parallel if arch.mixture else config.parallel.without_experts,
        config.optimizer,
        policy.groups,
        temperature=config.rollout.temperature,
        run_updates=1,  # none is taken
    )
    model.load(source)
    device_type = policy.groups.platform.device_type
    return OtherModel(model, leaves=config.offload_on(device_type) == "weights")


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
    agree_or_raise(error, groups.world)
    same_or_raise(
        f"ops.backend={choice}",
        told,
        "ranks that split a vocabulary would wait in different collectives. Install the package "
        "alike on all machines, or set ops.backend=reference",
        groups.world,
    )
    return told
