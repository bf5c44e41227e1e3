"""What a rank does to go on at another layout: fill weights and optimizer, save, load, compare.

Imported on ranks only, after preload_megatron has adapted Megatron-Core.
"""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import preload_megatron  # noqa: F401  # isort: split
import torch
import torch.distributed as dist
from layout import Layout
from megatron.core import dist_checkpointing
from policy_on_ranks import groups_at, small_buckets
from torch import Tensor

from megatron_rl.errors import InputError
from megatron_rl.megatron.checkpoint import load_model, sharded_state
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.policy.policy import Policy
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.layouts import hf_shapes
from megatron_rl.weights.model_source import ModelSource
from megatron_rl.weights.pieces import view

STATE = ("weights", "exp_avg", "exp_avg_sq")
Whole = dict[str, dict[str, Tensor]]  # of STATE -> Hugging Face name -> tensor


def save_and_load(
    layouts: tuple[Layout, ...], pairs: set[tuple[str, str]], models: Path, folder: Path
) -> list[tuple[str, str, list[str]]]:
    """(saved at, loaded at, tensors that differ) of every pair; layouts here and elsewhere.

    Every layout of this world saves; then each loads what its pairs say.
    """
    # Megatron-Core writes in child processes, which a daemon may not have.
    multiprocessing.current_process()._config["daemon"] = False
    for layout in layouts:
        with _policy_at(layout, models / layout.model) as policy:
            _fill(policy, whole_of(policy))
            saved = folder / layout.name
            if dist.get_rank() == 0:
                saved.mkdir(parents=True)
            dist.barrier()
            dist_checkpointing.save(sharded_state(policy, is_loading=False), str(saved))
    found = []
    for layout in layouts:
        for name in (source for source, target in sorted(pairs) if target == layout.name):
            with _policy_at(layout, models / layout.model) as policy:
                load_model(policy, folder / name)
                found.append((name, layout.name, _differing(policy, whole_of(policy))))
    for child in multiprocessing.active_children():
        child.kill()
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, found)
    return [
        (*pair[:2], sorted({name for rank in told for name in rank[number][2]}))
        for number, pair in enumerate(found)
    ]


def loaded_by_another_kind(folder: Path, layout: Layout, models: Path, *, is_sharded: bool) -> str:
    """What a rank says to a checkpoint of the other kind of optimizer."""
    settings = {"use_distributed_optimizer": is_sharded}
    with _policy_at(layout, models / layout.model, **settings) as policy:
        try:
            load_model(policy, folder)
        except InputError as error:
            return str(error)
    return "it was taken"


@contextmanager
def _policy_at(layout: Layout, source: Path, **optimizer: Any) -> Iterator[Policy]:
    """A policy of other weights than any checkpoint has, with an optimizer that has state."""
    with groups_at(layout) as (parallel, groups):
        policy = Policy(
            read_model_config(source),
            ModelConfig(path=str(source), dtype="float32"),
            parallel,
            OptimizerConfig(**optimizer),
            groups,
            temperature=1.0,
            run_updates=1,
        )
        policy.load(ModelSource(config_dir=source))
        with small_buckets() if layout.overlaps_reduction else nullcontext():
            policy.prepare_training()
        yield policy


def whole_of(policy: Policy) -> Whole:
    """Tensors of the whole model that every rank draws alike, whatever the layout."""
    generator = torch.Generator().manual_seed(11)
    return {
        kind: {
            name: torch.rand(shape, generator=generator)
            for name, shape in hf_shapes(policy.arch).items()
        }
        for kind in STATE
    }


def _own(policy: Policy, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of whole tensors, by parameter; NaN is padding."""
    params = policy.named_parameters()
    own = {name: torch.full_like(param, torch.nan) for name, param in params.items()}
    for piece in policy.pieces:
        view(own[piece.param], piece.index).copy_(view(whole[piece.hf], piece.box))
    return own


def _held(policy: Policy) -> Iterator[tuple[str, range, Tensor, dict[str, Tensor]]]:
    """(parameter, its elements, main weights, state) of all that this rank's optimizers hold."""
    several = policy.groups.layout.vpp > 1
    names = {
        id(param): (f"chunk{number}." if several else "") + name
        for number, chunk in enumerate(policy.chunks)
        for name, param in chunk.named_parameters()
    }
    for part in policy.optimizer.chained_optimizers:
        if hasattr(part, "model_param_group_index_map"):
            for param, (group, order) in part.model_param_group_index_map.items():
                main = part.optimizer.param_groups[group]["params"][order]
                here = part._get_model_param_range_map(param)["param"]
                elements = range(here.start, here.end)
                yield names[id(param)], elements, main, part.optimizer.state[main]
        else:
            for param in (p for group in part.param_groups for p in group["params"]):
                yield names[id(param)], range(param.numel()), param, part.optimizer.state[param]


def _fill(policy: Policy, whole: Whole) -> None:
    """Weights and the optimizer's means become those of the whole tensors."""
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:  # a step makes the state
            for main in group["params"]:
                main.grad = torch.zeros_like(main)
        part.optimizer.step()
    own = {kind: _own(policy, whole[kind]) for kind in STATE}
    for name, param in policy.named_parameters().items():
        param.copy_(own["weights"][name].nan_to_num())
    for name, elements, main, state in _held(policy):
        for kind, target in (("weights", main), *((kind, state[kind]) for kind in STATE[1:])):
            source = own[kind][name].nan_to_num().view(-1)
            target.data.view(-1).copy_(source[elements.start : elements.stop])


def _differing(policy: Policy, whole: Whole) -> list[str]:
    """What is not bit for bit as in the whole tensors, but for rows of padding."""
    own = {kind: _own(policy, whole[kind]) for kind in STATE}
    wrong = [
        f"parameter {name}"
        for name, param in policy.named_parameters().items()
        if not _equal(param, own["weights"][name])
    ]
    held = 0
    for name, elements, main, state in _held(policy):
        held += len(elements)
        assert int(state["step"]) == 1
        for kind, found in (("weights", main), *((kind, state[kind]) for kind in STATE[1:])):
            expected = own[kind][name].view(-1)[elements.start : elements.stop]
            if not _equal(found.view(-1), expected):
                wrong.append(f"{kind} of {name}")
    assert held
    return wrong


def _equal(found: Tensor, expected: Tensor) -> bool:
    is_known = ~expected.isnan()
    return torch.equal(found[is_known], expected[is_known])
