"""The process groups of a run, made once."""

import functools
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from megatron_rl.parallel import shared_memory
from megatron_rl.parallel.layout import Coordinates, EngineLayout, Layout, PolicyEngines
from megatron_rl.parallel.place import job_rank, job_size
from megatron_rl.parallel.sides import PATIENCE, Job, Side
from megatron_rl.platforms.base import Platform

TIMEOUT = timedelta(minutes=30)

_OF_A_LONE_PROCESS = HashStore()


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The place of this rank in the layout, and its process groups."""

    platform: Platform
    layout: Layout
    engines: EngineLayout | PolicyEngines
    rank: int
    world: dist.ProcessGroup  # the whole world, for CPU tensors and objects
    bridge: dist.ProcessGroup  # weight sync, apart from everybody else's collectives
    engine: dist.ProcessGroup  # likewise, the ranks that generate in step with this one
    tensor_parallel: dist.ProcessGroup | None  # Megatron's; None where a layer is not split
    context_parallel: dist.ProcessGroup | None  # Megatron's; None where a sequence is not split
    nodes: tuple[int, ...]  # of every rank, the number of its node

    @property
    def here(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.here.pp_rank == self.layout.pp - 1

    @property
    def is_first_copy(self) -> bool:
        """True on one rank of each data-parallel replica (last stage, tp_rank 0, cp_rank 0).

        Only these add to sums over whole sequences, so nothing counts twice.
        """
        return self.is_first_of_part and self.here.cp_rank == 0

    @property
    def is_first_of_part(self) -> bool:
        """The same for each context-parallel part of a replica: these add sums over own tokens."""
        return self.is_last_stage and self.here.tp_rank == 0


def init_distributed(platform: Platform, side: Side | None = None) -> None:
    """Join the world torchrun started, or this rank's side of it; a lone process is a world of one.

    side: as take_side gave it; None: all ranks are on one.
    """
    if dist.is_initialized():
        return
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)
    if os.environ["MASTER_PORT"] == "0":
        os.environ["MASTER_PORT"] = str(_free_port())
    platform.bind_rank(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        platform.collective_backend,
        store=store_of_this_attempt("groups" if side is None else f"groups/{side.name}"),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )


def store_of_this_attempt(name: str) -> Store:
    """A client of the store through which ranks find each other; names are apart.

    torchrun's own outlives ranks that it restarts (`--max-restarts`), and would give the new ones
    the addresses of the dead.
    """
    if job_size() == 1:
        return PrefixStore(name, _OF_A_LONE_PROCESS)  # nobody else has to reach it, so no socket
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_torchruns and job_rank() == 0:
        _serve(*place)
    store = TCPStore(*place, job_size(), timeout=TIMEOUT)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"megatron_rl/attempt_{attempt}/{name}", store)


@functools.cache
def _serve(address: str, port: int) -> TCPStore:
    """The server that clients connect to, held until the process ends.

    One that only a client held would close with it, maybe before the other ranks have read.
    """
    return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=TIMEOUT)


def join_job(platform: Platform, side: Side) -> Job:
    """The groups over both sides of a job; every rank calls it, after init_distributed."""
    world = _group_over(side, "job", platform.host_backend)
    bridge = _group_over(side, "bridge", platform.collective_backend)
    return Job(side=side, world=world, bridge=bridge, nodes=_nodes(world))


def _group_over(side: Side, name: str, backend: str) -> dist.ProcessGroup:
    """A group of all ranks of the job, which new_group could make within one side only."""
    place = (store_of_this_attempt(f"both/{name}"), side.job_rank, side.job_size)
    if backend == shared_memory.NAME:
        return shared_memory.SharedMemoryGroup(*place, PATIENCE)
    group = dist.ProcessGroup(*place)
    made: Any
    if backend == "gloo":
        kind, device = dist.ProcessGroup.BackendType.GLOO, "cpu"
        made = dist.ProcessGroupGloo(*place, PATIENCE)
    else:
        kind, device = dist.ProcessGroup.BackendType.NCCL, "cuda"
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = PATIENCE
        made = dist.ProcessGroupNCCL(*place, options)
    group._register_backend(torch.device(device), kind, made)
    group._set_default_backend(kind)
    return group


def make_groups(
    platform: Platform,
    layout: Layout,
    rollout_tp: int | None,
    *,
    tensor_parallel: dist.ProcessGroup | None,
    context_parallel: dist.ProcessGroup | None,
) -> Groups:
    """The groups of a run; Megatron has made the two given ones already. Every rank calls it.

    rollout_tp: ranks of a rollout engine; None: the policy itself is the engine.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    engines: EngineLayout | PolicyEngines = PolicyEngines(layout)
    if rollout_tp is not None:
        engines = EngineLayout(world_size=world_size, tp=rollout_tp)
    # Every rank has to call new_group for all groups, also for those that it is not in.
    host = platform.host_backend
    made = {ranks: dist.new_group(list(ranks), backend=host) for ranks in engines.in_step}
    (engine,) = (group for ranks, group in made.items() if rank in ranks)
    world = dist.new_group(backend=host, timeout=TIMEOUT)
    return Groups(
        platform=platform,
        layout=layout,
        engines=engines,
        rank=rank,
        world=world,
        bridge=dist.new_group(timeout=TIMEOUT),
        engine=engine,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        nodes=_nodes(world),
    )


def _nodes(world: dist.ProcessGroup) -> tuple[int, ...]:
    """The node of every rank: a machine, or the ranks on it that one torchrun agent started."""
    names = [""] * dist.get_world_size(world)
    own = f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"
    dist.all_gather_object(names, own, group=world)
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(number_of[name] for name in names)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
