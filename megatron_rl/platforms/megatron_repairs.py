"""Faults of Megatron-Core 0.16.1, each repaired by name, on CPU and GPU alike.

They are applied after import, and only to the version they were found in: another version is
refused, since a repair that no longer fits is a new fault.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import InputError

SUPPORTED_VERSION = "0.16.1"


def apply() -> None:
    """Import the modules concerned and repair them; harmless when repeated."""
    version = importlib.metadata.version("megatron-core")
    if version != SUPPORTED_VERSION:
        raise InputError(
            f"megatron-core {version} is installed: this package repairs and relies on exactly "
            f"{SUPPORTED_VERSION}. Install megatron-core=={SUPPORTED_VERSION}"
        )
    _adam_step_survives_a_load()
    _experts_run_without_transformer_engine()


def _experts_run_without_transformer_engine() -> None:
    """The router asks for a name that only Transformer Engine binds, and the dispatcher expects
    numpy arrays, which stock code makes of CUDA tensors only.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    stock = moe_utils.maybe_move_tensor_to_cpu
    if getattr(stock, "_megatron_rl_repaired", False):
        return

    @functools.wraps(stock)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = stock(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    move._megatron_rl_repaired = True  # type: ignore[attr-defined]
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = move


def _adam_step_survives_a_load() -> None:
    """torch's Adam under the distributed optimizer (no Apex, no Transformer Engine).

    Stock code (1) cannot load into an optimizer that has not stepped, (2) copies `step`, which the
    checkpoint does not hold, and (3) leaves all parameters with one shared `step` tensor, which
    then advances once per parameter: wrong bias correction, without an error.
    """
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if getattr(cls, "_megatron_rl_repaired", False):
        return
    if getattr(distrib_optimizer, "HAVE_APEX_OR_TE", False):
        return  # there the step lives in the parameter group
    cls._megatron_rl_repaired = True
    cls._set_main_param_and_optimizer_states = _keeping_step(
        cls._set_main_param_and_optimizer_states
    )
    cls.load_state_dict = _with_own_steps(cls.load_state_dict)
    cls.sharded_state_dict = _with_states(cls.sharded_state_dict)


def _keeping_step(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        stock(self, model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    return set_states


def _with_own_steps(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        stock(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    return load_state_dict


def _with_states(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param.data),
                        "exp_avg_sq": torch.zeros_like(param.data),
                    }
        return stock(self, *args, **kwargs)

    return sharded_state_dict
