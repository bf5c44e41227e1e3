"""Faults of Megatron-Core that are repaired by name when it is entered, on CPU and GPU alike.

A repair is made only at a version that has the fault (faults.py), since one that no longer fits is
a new fault.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from megatron_rl.megatron import faults


@functools.cache
def apply() -> None:
    """Import the modules concerned and repair them; harmless when repeated."""
    for fault, repair in REPAIRS.items():
        if faults.is_present(fault):
            repair()


# -- experts ---------------------------------------------------------------------------------------


def bind_router_product() -> None:
    """Bind a name that the router compares with None and only Transformer Engine binds."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def give_numpy_on_a_cpu() -> None:
    """Make numpy arrays of CPU tensors, too, which the dispatcher expects."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    stock = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(stock)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = stock(tensor, as_numpy=as_numpy, record_stream=record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = move


# -- latent attention ------------------------------------------------------------------------------


def look_for_linear_of_te() -> None:
    """Say that Transformer Engine is there only where its linear is, which layers may be of."""
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = isinstance(multi_latent_attention.TELinear, type)


# -- gated delta nets ------------------------------------------------------------------------------


def build_without_fla() -> None:
    """Let a gated delta net be built without kernels that ours does not call."""
    from megatron.core.ssm import gated_delta_net

    getattr(gated_delta_net, "common", gated_delta_net).HAVE_FLA = True


# -- torch's Adam under the distributed optimizer --------------------------------------------------


def give_states_to_load_into() -> None:
    """Give an optimizer that has not stepped the states that a first step would make."""
    _repair_optimizer("sharded_state_dict", _with_states)


def keep_step() -> None:
    """Let a load copy `step` onto itself, since the checkpoint does not hold it as a tensor."""
    _repair_optimizer("_set_main_param_and_optimizer_states", _keeping_step)


def give_own_steps() -> None:
    """Give every parameter a `step` tensor of its own after a load."""
    _repair_optimizer("load_state_dict", _with_own_steps)


def _repair_optimizer(method: str, repaired: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a method, but not under Apex or Transformer Engine: their step is in param_groups."""
    from megatron.core.optimizer import distrib_optimizer

    if not getattr(distrib_optimizer, "HAVE_APEX_OR_TE", False):
        optimizer = distrib_optimizer.DistributedOptimizer
        setattr(optimizer, method, repaired(getattr(optimizer, method)))


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


# -- what the distributed optimizer saves ----------------------------------------------------------


def leave_padding_out() -> None:
    """Cut a checkpoint's state where it stands: it is gathered without the padding of buckets."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stock = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(stock)
    def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _without_padding(self.buffers):
            return stock(self, *args, **kwargs)

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_state


@contextmanager
def _without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """Inside, the parameters of a buffer stand where they would if no bucket were padded."""
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding = (bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets)
        before = list(accumulate(padding, initial=0))
        buffer.param_index_map = {
            param: (start - before[bucket], end - before[bucket], bucket)
            for param, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, positions in zip(buffers, padded, strict=True):
            buffer.param_index_map = positions


REPAIRS = {
    "router_without_transformer_engine": bind_router_product,
    "latent_attention_without_te": look_for_linear_of_te,
    "delta_net_without_fla": build_without_fla,
    "dispatcher_without_numpy": give_numpy_on_a_cpu,
    "adam_without_states": give_states_to_load_into,
    "adam_step_not_saved": keep_step,
    "adam_step_shared": give_own_steps,
    "state_of_several_buckets": leave_padding_out,
}
