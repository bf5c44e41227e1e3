"""What a rank does with checkpoints: load them by Megatron-Core and by ourselves, save, export.

Imported on ranks only, after preload_megatron has adapted Megatron-Core.
"""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preload_megatron  # noqa: F401  # isort: split
import torch
import torch.distributed as dist
from layout import Layout
from logits_on_ranks import loaded_policy
from megatron.core import dist_checkpointing
from policy_on_ranks import groups_at
from torch import Tensor

import megatron_rl.weights.export as export_module
from megatron_rl.megatron.checkpoint import sharded_state
from megatron_rl.policy.policy import Policy
from megatron_rl.weights.export import export_hf
from megatron_rl.weights.model_source import ModelSource


def use_checkpoints(layouts: tuple[Layout, ...], models_of: Any, folder: Path) -> None:
    """Everything, at every layout, for every model; what goes wrong is raised."""
    # Megatron-Core writes in child processes, which a daemon may not have.
    multiprocessing.current_process()._config["daemon"] = False
    for layout in layouts:
        with groups_at(layout) as (parallel, groups):
            for name in models_of(layout):
                source = folder / "models" / name
                policy = loaded_policy(source, parallel, groups)
                expected = policy.snapshot()
                _load_both_ways(policy, folder / "converted" / name / "iter_0000001", expected)
                saved = folder / "saved" / layout.name / name
                _on_main(lambda saved=saved: saved.mkdir(parents=True))
                dist_checkpointing.save(_sharded_state(policy), str(saved))
                _export(policy, source, folder / "exported" / layout.name / name)
    for child in multiprocessing.active_children():
        child.kill()


def save_with_optimizer(source: Path, output: Path) -> None:
    """A bfloat16 policy and its float32 main weights, as a run's checkpoint holds them."""
    multiprocessing.current_process()._config["daemon"] = False
    with groups_at(Layout(name="TP2", world=2, tp=2)) as (parallel, groups):
        policy = loaded_policy(source, parallel, groups, dtype="bfloat16")
        policy.prepare_training()
        for group in policy.optimizer.param_groups:  # what bfloat16 cannot hold
            for main in group["params"]:
                main.data.add_(main.data.abs() * 2**-10)
        _on_main(lambda: output.mkdir(parents=True))
        dist_checkpointing.save(sharded_state(policy, is_loading=False), str(output))
    for child in multiprocessing.active_children():
        child.kill()


def _load_both_ways(policy: Policy, checkpoint: Path, expected: dict[str, Tensor]) -> None:
    params = policy.named_parameters()

    def equal_after(load: Callable[[], None]) -> None:
        for param in params.values():
            param.fill_(torch.nan)
        load()
        wrong = [name for name, param in params.items() if not torch.equal(param, expected[name])]
        assert not wrong, (checkpoint, load.__name__, wrong)

    def stock() -> None:  # asks for the extra states too, and raises for what it does not find
        loaded = dist_checkpointing.load(_sharded_state(policy), str(checkpoint))
        for number, chunk in enumerate(policy.chunks):
            chunk.load_state_dict(loaded[f"model{number}"])

    def ours() -> None:
        policy.load(ModelSource(config_dir=checkpoint / "hf_config", megatron_dir=checkpoint))

    equal_after(stock)
    equal_after(ours)


def _export(policy: Policy, source: Path, output: Path) -> None:
    """In files and batches of a few tensors."""
    stock = export_module.plan_files
    export_module.plan_files = lambda nbytes, limit: stock(nbytes, min(limit, 40_000))
    try:
        export_hf(
            policy.named_parameters(),
            policy.arch,
            policy.groups,
            source=source,
            output=output,
            dtype=policy.dtype,
            file_mib=1,
        )
    finally:
        export_module.plan_files = stock


def _sharded_state(policy: Policy) -> dict[str, Any]:
    return {
        f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(policy.chunks)
    }


def _on_main(work: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        work()
    dist.barrier()
