"""Process groups on CPUs whose ranks meet in memory that they share, where they are on one machine.

Gloo hands every message to threads and sockets, and a small model's ranks wait for those longer
than they compute. Here a rank writes to memory that all of its group have mapped, and reads what
the others have written (csrc/shared_memory). Sums are taken in the order of the ranks, so that a
result depends on nothing else. What is not listed in SharedMemoryGroup goes over gloo, and so does
all of a group whose ranks are on several machines.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from megatron_rl.errors import InputError
from megatron_rl.ops import native

NAME = "shared_memory"
"""The backend, for init_process_group and new_group."""

SWITCH = "MEGATRON_RL_SHARED_MEMORY"
SLOT_BYTES = 1 << 18
"""What a rank writes at a time: its second-level cache holds that twice."""

_REDUCTIONS = (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN)
_REDUCED = frozenset((*native.CPU_DTYPES, torch.int64, torch.int32))
_Group: Any = dist.ProcessGroup  # whose methods have several signatures, of which torch calls one


class SharedMemoryGroup(_Group):
    """A gloo group with faster ways for what training and sampling do all the time.

    A collective has ended when its call returns, whether or not it was asked for in the background.
    A rank that ends while others wait for it is noticed within 20 ms; ranks that meet for different
    things are told so.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        # A group of its own, since torch keeps Python's lock during what the base of a group in
        # Python does, and gloo's threads want that lock to let go of tensors.
        self._gloo = dist.ProcessGroup(store, rank, size)
        for group in (self, self._gloo):
            group._register_backend(_DEVICE, dist.ProcessGroup.BackendType.GLOO, gloo)
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._memory = _memory_of(store, rank, size, timeout)

    @property
    def is_shared(self) -> bool:
        """True where its ranks share memory."""
        return self._memory is not None

    def allreduce(self, tensors: Any, opts: Any) -> Any:
        reduction = _number_of(opts.reduceOp)
        if not self._takes(tensors, reduction):
            return self._gloo.allreduce(tensors, opts)
        for tensor in tensors:
            self._run(_OPS.shared_all_reduce_, tensor, reduction)
        return _DONE

    def allreduce_coalesced(self, tensors: Any, opts: Any) -> Any:
        if not self._takes(tensors, _number_of(opts.reduceOp)):
            return self._gloo.allreduce_coalesced(tensors, opts)
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: Any, opts: Any) -> Any:
        if self._memory is None:
            return self._gloo.broadcast(tensors, opts)
        for tensor in tensors:
            self._run(_OPS.shared_broadcast_, tensor, opts.rootRank)
        return _DONE

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any) -> Any:
        if self._memory is None:
            return self._gloo._allgather_base(output, tensor, opts)
        self._run(_OPS.shared_all_gather, output, inputs=(tensor,))
        return _DONE

    def allgather_into_tensor_coalesced(self, outputs: Any, tensors: Any, opts: Any) -> Any:
        if self._memory is None:
            return self._gloo.allgather_into_tensor_coalesced(outputs, tensors, opts)
        for output, tensor in zip(outputs, tensors, strict=True):
            self._run(_OPS.shared_all_gather, output, inputs=(tensor,))
        return _DONE

    def allgather(self, outputs: Any, tensors: Any, opts: Any) -> Any:
        is_even = all(part.shape == tensors[0].shape for part in outputs[0])
        if self._memory is None or not is_even:
            return self._gloo.allgather(outputs, tensors, opts)
        (parts,), (tensor,) = outputs, tensors
        gathered = tensor.new_empty((len(parts), *tensor.shape))
        self._run(_OPS.shared_all_gather, gathered, inputs=(tensor,))
        with torch.no_grad():
            for part, found in zip(parts, gathered, strict=True):
                part.copy_(found)
        return _DONE

    def _reduce_scatter_base(self, output: Tensor, tensor: Tensor, opts: Any) -> Any:
        reduction = _number_of(opts.reduceOp)
        if not self._takes([tensor], reduction):
            return self._gloo._reduce_scatter_base(output, tensor, opts)
        self._run(_OPS.shared_reduce_scatter, output, reduction, inputs=(tensor,))
        return _DONE

    def reduce_scatter_tensor_coalesced(self, outputs: Any, tensors: Any, opts: Any) -> Any:
        reduction = _number_of(opts.reduceOp)
        if not self._takes(tensors, reduction):
            return self._gloo.reduce_scatter_tensor_coalesced(outputs, tensors, opts)
        for output, tensor in zip(outputs, tensors, strict=True):
            self._run(_OPS.shared_reduce_scatter, output, reduction, inputs=(tensor,))
        return _DONE

    def alltoall_base(
        self, output: Tensor, tensor: Tensor, received: Any, sent: Any, opts: Any
    ) -> Any:
        if self._memory is None:
            return self._gloo.alltoall_base(output, tensor, received, sent, opts)
        parts = [_bytes_of(tensor, sent, self.size()), _bytes_of(output, received, self.size())]
        self._run(_OPS.shared_all_to_all, output, inputs=(tensor, *parts))
        return _DONE

    def barrier(self, opts: Any) -> Any:
        if self._memory is None:
            return self._gloo.barrier(opts)
        _OPS.shared_barrier(_ANCHOR, self._memory)
        return _DONE

    # The same by the names that torch has from 2.13 on.
    all_to_all_single = alltoall_base
    all_gather_single = _allgather_base
    all_gather_single_coalesced = allgather_into_tensor_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def shutdown(self) -> None:
        self._leave()
        self._gloo.shutdown()

    def abort(self) -> None:
        self._leave()
        self._gloo.abort()

    def _leave(self) -> None:
        """Nobody waits for this rank any more."""
        if self._memory is not None:
            memory, self._memory = self._memory, None
            _OPS.shared_close(_ANCHOR, memory)

    def _takes(self, tensors: Sequence[Tensor], reduction: int | None) -> bool:
        """Every rank decides the same: all ask for one reduction of one dtype."""
        is_known = reduction is not None and all(one.dtype in _REDUCED for one in tensors)
        return self._memory is not None and is_known

    def _run(
        self,
        operation: Callable[..., None],
        output: Tensor,
        *settings: object,
        inputs: Sequence[Tensor] = (),
    ) -> None:
        """Run operation on output and dense inputs; output may have any strides."""
        with torch._C._AutoDispatchBelowAutograd():  # as torch's own collectives do
            dense = output.contiguous()
            others = [one.contiguous() for one in inputs]
            operation(dense, *others, self._memory, *settings)
            if dense is not output:
                output.copy_(dense)


class _Done(dist.Work):
    """What was asked for has been done."""

    def __init__(self) -> None:
        super().__init__()

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True


_DONE = _Done()
_ANCHOR = torch.zeros(0, dtype=torch.int64)  # by whose device ops without other tensors are found
_DEVICE = _ANCHOR.device
_OPS: Any = torch.ops.megatron_rl


def _number_of(reduction: Any) -> int | None:
    """Of a reduction, as csrc/shared_memory/reduce.h counts them; None: it is not there."""
    for number, known in enumerate(_REDUCTIONS):
        if reduction == known:
            return number
    return None


def _memory_of(store: Store, rank: int, size: int, timeout: timedelta) -> int | None:
    """The number of the memory that the ranks of a group share; None where they cannot.

    All of them find the same. It has no name, so that nothing is left behind by whoever is killed:
    the others open it through the process of rank 0.
    """
    own = _machine() if means() != "gloo" else f"rank {rank}"
    store.set(f"place/{rank}", f"{os.getpid()} {own}")
    told = store.multi_get([f"place/{other}" for other in range(size)])
    places = [place.decode().partition(" ")[::2] for place in told]
    if len({machine for _, machine in places}) > 1 or own.startswith("rank"):
        return None
    pids = torch.tensor([int(pid) for pid, _ in places])
    if rank == 0:
        file = _OPS.shared_create(pids, SLOT_BYTES)
        store.set("memory", str(file))
    else:
        file = _opened(int(pids[0]), int(store.get("memory")))
    memory = None
    with suppress(RuntimeError):
        memory = _OPS.shared_open(pids, file, rank, SLOT_BYTES, timeout.total_seconds())
    store.set(f"has/{rank}", str(int(memory is not None)))
    everybody = b"".join(store.multi_get([f"has/{other}" for other in range(size)]))
    if file >= 0:
        os.close(file)
    if b"0" not in everybody:
        return memory
    if memory is not None:
        _OPS.shared_close(_ANCHOR, memory)
    return None


def _opened(pid: int, file: int) -> int:
    """A file of another process, which has no name; -1 where it cannot be opened."""
    try:
        return os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


def _machine() -> str:
    """Equal in processes that can share memory: one system, one user, one view of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"


def is_in(group: dist.ProcessGroup) -> bool:
    """True where the ranks of group share memory."""
    return isinstance(group, SharedMemoryGroup) and group.is_shared


def means() -> str:
    """What ranks of one machine would meet by on a CPU."""
    is_built = native.has("shared_open", _DEVICE)
    return "shared memory" if is_wanted() and is_built else "gloo"


def is_wanted() -> bool:
    """False where MEGATRON_RL_SHARED_MEMORY=0 asks for gloo alone.

    Raises:
        InputError: it is anything but 0 and 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise InputError(
            f"{SWITCH}={value}: expected 1 (ranks on CPUs of one machine meet in shared memory) "
            f"or 0 (they meet over gloo). unset {SWITCH}"
        )
    return value == "1"


def _bytes_of(tensor: Tensor, rows: Sequence[int], size: int) -> Tensor:
    """Bytes of each rank's part of a tensor: so many rows, or where none are given equal parts."""
    shape = list(rows) if len(rows) else [tensor.shape[0] // size] * size
    row_bytes = tensor[:1].numel() * tensor.element_size()
    return torch.tensor(shape) * row_bytes


def _forwarded(name: str) -> Callable[..., Any]:
    def forward(group: SharedMemoryGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(group._gloo, name)(*args, **kwargs)

    return forward


for _name in (
    *("allgather_coalesced", "alltoall", "gather", "monitored_barrier", "recv", "recv_anysource"),
    *("reduce", "reduce_scatter", "scatter", "send"),
):
    setattr(SharedMemoryGroup, _name, _forwarded(_name))

dist.Backend.register_backend(NAME, SharedMemoryGroup, devices=["cpu"])
