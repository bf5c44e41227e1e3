"""Megatron-Core for a rehearsal: what would ask a device for numbers gets them from here."""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_rl.megatron import on_cpu

if TYPE_CHECKING:
    from megatron_rl.megatron.model import TrainedModel


def install(device: str) -> None:
    """Retarget Megatron-Core to the device of a rehearsal; once, before its first import."""
    on_cpu.install(device)


@functools.cache
def adapt() -> None:
    """Replace what needs generators or numbers of a device; after Megatron-Core was entered."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import token_dispatcher

    @contextlib.contextmanager
    def fork(self: Any, name: str = "") -> Iterator[None]:
        yield  # nothing that is rehearsed draws

    stock = token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess

    def preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        # Which experts a token goes to are numbers, and how many go to each are sizes.
        tokens, experts = routing_map.shape
        gather = token_dispatcher.gather_from_sequence_parallel_region
        token_dispatcher.gather_from_sequence_parallel_region = _of_equals
        try:
            with unset_fake_temporarily(), torch.device("cpu"):
                even = _even(tokens, experts, self.config.moe_router_topk)
                counts: torch.Tensor = stock(self, even)
        finally:
            token_dispatcher.gather_from_sequence_parallel_region = gather
        return counts

    token_dispatcher.MoEAlltoAllTokenDispatcher.preprocess = preprocess
    CudaRNGStatesTracker.fork = fork


def leave() -> None:
    """Forget Megatron-Core's process groups, so that another world can be joined."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def expect_equal_rows(model: "TrainedModel") -> None:
    """Let stages not tell each other how long a row is, which are numbers of a device."""
    model.config.variable_seq_lengths = False


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Build modules on the device at once: a module of fake tensors cannot be moved."""
    stay: Any = torch.nn.Module
    former = {name: getattr(stay, name) for name in ("to", "bfloat16", "half")}
    for name in former:
        setattr(stay, name, lambda module, *_, **__: module)
    try:
        with device:
            yield
    finally:
        for name, method in former.items():
            setattr(stay, name, method)


def _of_equals(counts: torch.Tensor, group: Any) -> torch.Tensor:
    """What a group of ranks gathers of which all have the same."""
    return counts.repeat(group.size())


def _even(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """[tokens, experts] bool: a routing that gives all experts as many tokens."""
    chosen = torch.arange(tokens * top_k).view(tokens, top_k) % experts
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, value=True)
