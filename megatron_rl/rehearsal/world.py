"""A world of any number of ranks in one process: no bytes move, all are counted.

Every other rank is taken to be like this one: a sum over a group is its size times the own number,
and what others send is what this rank has. Tensors of the rehearsed device have no numbers anyway.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_rl.rehearsal.device import NAME


@dataclass(frozen=True, slots=True)
class Collective:
    """A kind of collective over a group of ranks."""

    name: str
    group: tuple[int, ...]  # global ranks


class World:
    """The collectives of one rank, counted."""

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank = world_size, rank
        self.calls: Counter[Collective] = Counter()
        self.bytes: Counter[Collective] = Counter()  # of the largest buffer that a rank hands in

    def join(self) -> None:
        """Make this process the rank of such a world, for the rest of its life or until leave."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        _replace(self)
        dist.init_process_group(
            "fake", rank=self.rank, world_size=self.world_size, store=FakeStore()
        )

    def leave(self) -> None:
        dist.destroy_process_group()

    def forget(self) -> None:
        """Count from zero."""
        self.calls.clear()
        self.bytes.clear()

    def count(self, name: str, group: Any, *buffers: Tensor) -> int:
        """Count a collective of the device; returns the number of ranks in the group."""
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        if any(buffer.device.type == NAME for buffer in buffers) and len(ranks) > 1:
            kind = Collective(name, tuple(ranks))
            self.calls[kind] += 1
            self.bytes[kind] += max(b.numel() * b.element_size() for b in buffers)
        return len(ranks)

    def count_message(self, name: str, tensor: Tensor, peer: int) -> None:
        """Count a message of the device to or from one rank."""
        if tensor.device.type == NAME:
            kind = Collective(name, (peer,))
            self.calls[kind] += 1
            self.bytes[kind] += tensor.numel() * tensor.element_size()


class _Done:
    """The handle of a collective that is over."""

    def wait(self, *_: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Coalesced:
    """A context of collectives that are sent together."""

    def __enter__(self) -> _Done:
        return _Done()

    def __exit__(self, *_: object) -> None:
        return None


_world: list[World] = []  # the one that counts now


def _replace(world: World) -> None:
    """Let torch.distributed's functions count in this world from now on."""
    if not _world:
        for name, stand_in in STAND_INS.items():
            for module in (dist, distributed_c10d):
                if hasattr(module, name):
                    setattr(module, name, stand_in)
        stock = dist.new_group

        @functools.wraps(stock)
        def new_group(*args: Any, **settings: Any) -> Any:
            settings["backend"] = "fake"
            settings.pop("pg_options", None)
            return stock(*args, **settings)

        dist.new_group = distributed_c10d.new_group = new_group
    _world[:] = [world]


def _all_reduce(
    tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> _Done | None:
    ranks = _world[0].count("all-reduce", group, tensor)
    if op == dist.ReduceOp.SUM and tensor.device.type == "cpu":
        tensor.mul_(ranks)
    return _Done() if async_op else None


def _all_gather_into_tensor(
    output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False
) -> _Done | None:
    ranks = _world[0].count("all-gather", group, output)
    if tensor.device.type == "cpu":
        output.copy_(tensor.repeat(ranks, *[1] * (tensor.dim() - 1)).view_as(output))
    return _Done() if async_op else None


def _all_gather(
    outputs: Sequence[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False
) -> _Done | None:
    _world[0].count("all-gather", group, *outputs)
    for output in outputs:
        output.copy_(tensor)
    return _Done() if async_op else None


def _reduce_scatter_tensor(
    output: Tensor, tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False
) -> _Done | None:
    _world[0].count("reduce-scatter", group, tensor)
    return _Done() if async_op else None


def _all_to_all_single(
    output: Tensor,
    tensor: Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> _Done | None:
    _world[0].count("all-to-all", group, output, tensor)
    if tensor.device.type == "cpu" and output.shape == tensor.shape:
        output.copy_(tensor)
    return _Done() if async_op else None


def _one_to_all(
    tensor: Tensor, *_: Any, group: Any = None, async_op: bool = False, **__: Any
) -> _Done | None:
    _world[0].count("broadcast", group, tensor)
    return _Done() if async_op else None


def _all_gather_object(outputs: list[Any], item: Any, group: Any = None) -> None:
    outputs[:] = [item] * len(outputs)


def _gather_object(item: Any, outputs: list[Any] | None = None, *_: Any, **__: Any) -> None:
    if outputs is not None:
        outputs[:] = [item] * len(outputs)


def _send(tensor: Tensor, dst: int, *_: Any, **__: Any) -> _Done:
    _world[0].count_message("send", tensor, dst)
    return _Done()


def _receive(tensor: Tensor, src: int, *_: Any, **__: Any) -> _Done:
    _world[0].count_message("receive", tensor, src)
    return _Done()


def _batch(operations: Sequence[Any]) -> list[_Done]:
    return [operation.op(operation.tensor, operation.peer) for operation in operations]


def _nothing(*_: Any, async_op: bool = False, **__: Any) -> _Done | None:
    return _Done() if async_op else None


STAND_INS: dict[str, Callable[..., Any]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "_all_gather_base": _all_gather_into_tensor,
    "all_gather": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "_reduce_scatter_base": _reduce_scatter_tensor,
    "all_to_all_single": _all_to_all_single,
    "broadcast": _one_to_all,
    "reduce": _one_to_all,
    "all_gather_object": _all_gather_object,
    "gather_object": _gather_object,
    "broadcast_object_list": _nothing,
    "send": _send,
    "recv": _receive,
    "isend": _send,
    "irecv": _receive,
    "batch_isend_irecv": _batch,
    "barrier": _nothing,
    "_coalescing_manager": lambda *_, **__: _Coalesced(),
}
