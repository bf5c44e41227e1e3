"""Megatron-Core's process groups, without which none of its models can be built."""

import torch.distributed as dist

from megatron_rl.megatron.enter import enter
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import TIMEOUT, Groups, make_groups
from megatron_rl.platforms.base import Platform


def join(platform: Platform, parallel: ParallelConfig, rollout_tp: int | None) -> Groups:
    """All process groups of a run; every rank calls it, after init_distributed.

    rollout_tp: ranks of a rollout engine; None: the policy itself is the engine.
    """
    enter(platform)
    from megatron.core import parallel_state

    layout = parallel.layout(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )
    return make_groups(
        platform,
        layout,
        rollout_tp,
        tensor_parallel=parallel_state.get_tensor_model_parallel_group() if layout.tp > 1 else None,
        context_parallel=parallel_state.get_context_parallel_group() if layout.cp > 1 else None,
    )
