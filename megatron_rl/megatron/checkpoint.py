"""A trained model as a distributed checkpoint of Megatron-Core, which loads at any layout.

With expert_model_parallel_size above 1, Megatron-Core has one optimizer of shared and one of expert
parameters, else one of all. Tensors of a checkpoint are the same under the same names; only what
stands beside them (settings and steps, by parameter group) is nested another way, and is fitted to
this layout when it is loaded. Settings are those of the recipe, never those of the checkpoint.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_rl.errors import InputError
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.megatron.writer import CheckpointWriter
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.dcp_files import read_metadata

# Names without the number of Megatron's optimizer, which depends on expert parallelism.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
# Two checkpoints' groups of parameters correspond where these entries are equal; layouts differ in
# whether experts have a group of their own.
ALIKE = ("wd_mult", "lr_mult", "is_decoupled_lr")
EXPERT = "is_expert_parallel"
# Entries of a group that are state; all others are settings, which the recipe decides.
GROUP_STATE = ("params", "step")
# Entries of the state of a distributed optimizer.
TENSORS, KIND = "param_state", "param_state_sharding_type"
LOSS_SCALE = "grad_scaler"  # of float16
STATE = "optimizer.state"
EMPTY = "of no parameter"


def writer_of(model: TrainedModel, directory: Path, groups: Groups) -> CheckpointWriter:
    """A writer of weights and optimizer into an existing directory; every rank calls it."""
    return CheckpointWriter(sharded_state(model, is_loading=False), directory, groups)


def load_model(model: TrainedModel, directory: Path) -> None:
    """Read weights and optimizer, saved at whatever layout; every rank calls it.

    Raises:
        InputError: the checkpoint is damaged or hostile.
    """
    # Byte entries of a checkpoint are pickles; this keeps torch from running them.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    saved = read_metadata(directory)  # a pickle, which Megatron-Core opens without looking
    state = sharded_state(model, is_loading=True)
    _check_kind(model, directory, _kinds(saved.state_dict_metadata), _kinds(_keys_in(state)))
    loaded = dist_checkpointing.load(state, str(directory))
    for number, chunk in enumerate(model.chunks):
        chunk.load_state_dict(loaded[f"model{number}"])
    model.optimizer.load_state_dict(fitted(model.optimizer, loaded["optimizer"]))


def _check_kind(model: TrainedModel, directory: Path, saved: set[str], wanted: set[str]) -> None:
    """Raise InputError where the state is that of an optimizer of another kind.

    A checkpoint's recipe tells the same before anything is built, if it is there.
    """
    if not wanted or saved == wanted:
        return
    is_sharded = hasattr(model.optimizer.chained_optimizers[0], "model_param_group_index_map")
    raise InputError(
        f"{directory}: of each parameter its optimizer has kept {', '.join(sorted(saved))}, and "
        f"this recipe's keeps {', '.join(sorted(wanted))}: it was made with another "
        "optimizer.use_distributed_optimizer or model.dtype. Set "
        f"optimizer.use_distributed_optimizer={str(not is_sharded).lower()}, or the former "
        f"model.dtype, or start another run from its weights: model.path={directory}"
    )


def _kinds(keys: Iterable[str]) -> set[str]:
    """What an optimizer keeps of a parameter: `exp_avg` of optimizer.state.exp_avg.NAME."""
    return {key.split(".")[2] for key in keys if key.startswith(f"{STATE}.")}


def _keys_in(state: Any) -> Iterator[str]:
    for part in nested_values(state):
        yield from (part.key,) if hasattr(part, "key") else ()


def sharded_state(model: TrainedModel, *, is_loading: bool) -> dict[str, Any]:
    """Megatron's description of what this rank holds of weights and optimizer."""
    model.residence.bring_weights()
    model.residence.bring_state()
    chunks = {
        f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(model.chunks)
    }
    every = {key: value for chunk in chunks.values() for key, value in chunk.items()}
    if len(model.chunks) > 1:
        every = chunks
    with _steps_of_empty_parts(model.optimizer.chained_optimizers):
        optimizer = model.optimizer.sharded_state_dict(
            every, is_loading=is_loading, metadata=SHARDING
        )
    return {**chunks, "optimizer": optimizer}


@contextmanager
def _steps_of_empty_parts(parts: Sequence[Any]) -> Iterator[None]:
    """Inside, an optimizer without a parameter has the steps of the other one.

    That of the experts is empty on a pipeline stage without them. Megatron-Core asks it for the one
    number of steps of its parameters all the same, and fails where there is none.
    """
    empty = [
        part.optimizer
        for part in parts
        if hasattr(part, "model_param_group_index_map")
        and not any(group["params"] for group in part.optimizer.param_groups)
    ]
    states = (state for part in parts for state in part.optimizer.state.values())
    steps = next((state["step"] for state in states if "step" in state), torch.tensor(0.0))
    for optimizer in empty:
        optimizer.state[EMPTY] = {"step": steps}
    try:
        yield
    finally:
        for optimizer in empty:
            optimizer.state.pop(EMPTY, None)


def fitted(optimizer: Any, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """Loaded state of any layout, nested as Megatron's optimizer of this rank reads it.

    Learning rate, betas and other settings of parameter groups become those that the optimizer was
    built with. Megatron-Core would take them from the checkpoint, or, where it knows groups by them
    (0.19), find no group at all.
    """
    saved = [
        part
        for part in (loaded, *loaded.values())
        if isinstance(part, dict) and KIND in part and "optimizer" in part
    ]
    if not saved:  # an optimizer that is not distributed, and so fits as it is nested
        for group in _groups_in(loaded):
            group.update(_settings(_alike(optimizer.param_groups, group, (*ALIKE, EXPERT))))
        return loaded
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    own = optimizer.chained_optimizers
    if len(own) == 1:
        return _part(own[0], saved[0], groups, loaded[TENSORS])
    return {
        number: _part(one, saved[0], groups, _tensors_of(one, loaded, number))
        for number, one in enumerate(own)
    }


def _tensors_of(optimizer: Any, loaded: dict[Any, Any], number: int) -> Any:
    """What is loaded for one of two optimizers; an empty one finds nothing."""
    is_empty = not optimizer.model_param_group_index_map
    return {} if is_empty else loaded[number][TENSORS]


def _part(
    optimizer: Any, saved: dict[Any, Any], groups: list[dict[str, Any]], tensors: Any
) -> dict[str, Any]:
    fitting = []
    for own in optimizer.optimizer.param_groups:
        fitting.append({**_alike(groups, own, ALIKE), **_settings(own)})
    return {
        **{name: saved[name] for name in (LOSS_SCALE,) if name in saved},
        KIND: saved[KIND],
        "optimizer": {**saved["optimizer"], "param_groups": fitting},
        TENSORS: tensors,
    }


def _alike(
    groups: list[dict[str, Any]], group: dict[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    for found in groups:
        if all(found[name] == group[name] for name in names):
            return found
    raise InputError(
        "parallel.expert_model_parallel_size: the checkpoint's optimizer is not distributed, and "
        "keeps the parameters of experts apart, or not, as this layout does not. Go on at the size "
        "that the checkpoint has; with optimizer.use_distributed_optimizer=true any would do"
    )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in GROUP_STATE}


def _groups_in(loaded: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """Every parameter group of optimizers that are not distributed, however they are nested."""
    for name, value in loaded.items():
        if name == "param_groups":
            yield from value
        elif isinstance(value, dict):
            yield from _groups_in(value)
