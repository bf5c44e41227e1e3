"""Optimizer state between layouts with and without expert parallelism.

With expert_model_parallel_size above 1, Megatron-Core has one optimizer of shared and one of expert
parameters, else one of all. Tensors of a checkpoint are the same under the same names; only what
stands beside them (learning rates and steps, by parameter group) is nested another way.
"""

from typing import Any

# Two checkpoints' groups of parameters are the same where these are; whether it holds experts is
# what differs between layouts.
ALIKE = ("wd_mult", "lr_mult", "is_decoupled_lr")
TENSORS, KIND = "param_state", "param_state_sharding_type"


def fitted(optimizer: Any, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """Loaded state of any layout, nested as Megatron's optimizer of this rank reads it.

    State of an optimizer that is not distributed is returned as it is.
    """
    saved = [
        part
        for part in (loaded, *loaded.values())
        if isinstance(part, dict) and KIND in part and "optimizer" in part
    ]
    if not saved:
        return loaded
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    own = optimizer.chained_optimizers
    if len(own) == 1:
        return _part(own[0], saved[0], groups, loaded[TENSORS])
    return {
        number: _part(one, saved[0], groups, loaded[number][TENSORS])
        for number, one in enumerate(own)
    }


def _part(
    optimizer: Any, saved: dict[Any, Any], groups: list[dict[str, Any]], tensors: Any
) -> dict[str, Any]:
    fitting = []
    for own in optimizer.optimizer.param_groups:
        alike = next(g for g in groups if all(g[name] == own[name] for name in ALIKE))
        fitting.append({**alike, "is_expert_parallel": own["is_expert_parallel"]})
    return {
        KIND: saved[KIND],
        "optimizer": {**saved["optimizer"], "param_groups": fitting},
        TENSORS: tensors,
    }
