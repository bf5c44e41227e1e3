"""Megatron-Core for a rehearsal: what would ask a device for numbers gets them from here."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from megatron_rl.megatron import on_cpu
from megatron_rl.types import MicroBatch


def install(device: str) -> None:
    """Retarget Megatron-Core to the device of a rehearsal; once, before its first import."""
    on_cpu.install(device)


def adapt(shape_of_messages: Callable[[], tuple[int, ...]]) -> None:
    """Replace what needs generators or numbers of a device; after Megatron-Core was entered.

    shape_of_messages: of the hidden states that pipeline stages send each other. They tell each
    other the shapes, which are numbers.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import token_dispatcher

    from megatron_rl.megatron import layers, schedule

    @contextlib.contextmanager
    def fork(self: Any, name: str = "") -> Iterator[None]:
        yield  # nothing that is rehearsed draws

    def communicate_shapes(
        self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        shape = shape_of_messages()
        return shape if recv_prev else None, shape if recv_next else None

    def packed_rows(row: MicroBatch, rope: Any) -> Any:
        # What the host computes has numbers, and the angles are of the device.
        with unset_fake_temporarily(), torch.device("cpu"):
            own = torch.zeros(int(row.cu_seqlens[-1]), dtype=torch.int64)
            no_angles: Any = _OnHost() if rope else None
            plan = layers.packed_rows(replace(row, position_ids=own), no_angles)
        if rope is None:
            return plan
        device = row.tokens.device
        return replace(
            plan,
            rotation=rope.rotation(row.position_ids),
            tokens=torch.empty(plan.tokens.shape, dtype=torch.int64, device=device),
            places=torch.empty(plan.places.shape, dtype=torch.int64, device=device),
        )

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
    vars(schedule)["packed_rows"] = packed_rows
    CudaRNGStatesTracker.fork = fork
    P2PCommunicator._communicate_shapes = communicate_shapes


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


class _OnHost:
    """Angles that nobody reads."""

    def rotation(self, position_ids: torch.Tensor) -> None:
        return None
