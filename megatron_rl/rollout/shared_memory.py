"""The shared memory of vLLM's all-reduce on a CPU, kept apart from that of other jobs."""

import glob
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def private_shared_memory(group: dist.ProcessGroup) -> Iterator[None]:
    """A context in which all ranks of group build their engines together.

    vLLM names the segments after the init method, which under external_launcher is the same for
    every job of a host: two jobs would share them, and those of a killed job would block the next.
    In this context the name is made for this job. It is removed once every rank has mapped the
    segments, which live on without a name, so that a kill leaves nothing behind.
    """
    from vllm.distributed.device_communicators import cpu_communicator

    communicator = getattr(cpu_communicator, "_CPUSHMDistributed", None)
    if communicator is None:  # only the build for CPUs has it
        yield
        return
    names = [f"megatron_rl-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(names, src=0, group=group)
    stock = communicator.make_group_name
    communicator.make_group_name = staticmethod(
        lambda communicator: f"{names[0]}-{stock(communicator).lstrip('/-')}"
    )
    try:
        yield
        dist.barrier(group)
    finally:
        communicator.make_group_name = staticmethod(stock)
        for segment in glob.glob(f"/dev/shm/{names[0]}-*"):
            Path(segment).unlink(missing_ok=True)
