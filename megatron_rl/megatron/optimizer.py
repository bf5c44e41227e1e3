"""Megatron's optimizer and learning-rate schedule."""

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rl.megatron.config import OptimizerConfig

# Constant schedules never reach the end of their decay.
FOREVER = 1 << 60
LEAST_LOSS_SCALE = 1.0
"""Of float16: where a gradient overflows even so, it is not the scale that is wrong."""


def build_optimizer(
    config: OptimizerConfig, chunks: list[Any], dtype: torch.dtype, *, is_sharded: bool
) -> Any:
    """AdamW over the model chunks (wrapped in Megatron's DDP)."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=config.initial_loss_scale,
        min_loss_scale=LEAST_LOSS_SCALE,
        params_dtype=dtype,
        use_distributed_optimizer=is_sharded,
    )
    optimizer = get_megatron_optimizer(settings, chunks)
    for part in optimizer.chained_optimizers:
        _fuse_on_cpu(part.optimizer)
    return optimizer


def _fuse_on_cpu(optimizer: torch.optim.Optimizer) -> None:
    """torch's Adam goes over a parameter in one pass instead of ten: Megatron-Core does not ask."""
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            if all(param.device.type == "cpu" for param in group["params"]):
                group["fused"] = True


def build_scheduler(config: OptimizerConfig, optimizer: Any, run_updates: int) -> Any:
    """The learning rate by optimizer step; run_updates is the most that the run can take."""
    decay = FOREVER if config.lr_schedule == "constant" else config.lr_decay_updates or run_updates
    # Megatron's first step would have the learning rate that the warm-up starts from: with 0 all
    # of an iteration would change nothing. One step further on, Megatron has the same line.
    warmup = min(config.lr_warmup_updates, decay)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / max(warmup, 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(warmup - 1, 0),  # Megatron asserts that this is less than decay
        lr_decay_steps=decay,
        lr_decay_style=config.lr_schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A checkpoint says how many steps were taken; all else is the recipe's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
