"""An all-reduce between ranks of this machine, by what a run would use; on GPUs that is NCCL."""

import faulthandler
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from megatron_rl.doctor.check import Result, failed, ok
from megatron_rl.parallel import shared_memory
from megatron_rl.platforms.base import Platform, detect

RANKS_ON_CPU = 2
NUMBERS = 1 << 20  # of the all-reduce, float32
SECONDS = 120  # after which a rank ends by itself, whoever is gone

GLOO_REMEDY = "GLOO_SOCKET_IFNAME=lo megatron-rl doctor  # and the same before a run"
NCCL_REMEDY = "NCCL_P2P_DISABLE=1 megatron-rl doctor  # or NCCL_DEBUG=INFO, which says more"

Body = Callable[[int, int, str], None]


def check_all_reduce(body: Body | None = None) -> Result:
    """body: what a rank does, for tests."""
    platform = detect()
    is_cuda = platform.device_type == "cuda"
    world_size = platform.most_ranks() if is_cuda else RANKS_ON_CPU
    with tempfile.TemporaryDirectory(prefix="megatron_rl-doctor-") as folder:
        try:
            spawn(body or reduce_on_rank, args=(world_size, folder), nprocs=world_size)
        except (ProcessRaisedException, ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            return failed(f"{_over(platform, world_size)}: {last}", _remedy(platform))
        totals = {float(file.read_text()) for file in Path(folder).glob("total-*")}
        slowest = max(float(file.read_text()) for file in Path(folder).glob("seconds-*"))
    expected = world_size * (world_size + 1) / 2
    if totals != {expected}:
        wrong = f"the sum is {', '.join(map(str, sorted(totals)))} and should be {expected}"
        return failed(f"{_over(platform, world_size)}: {wrong}", _remedy(platform))
    return ok(f"{_over(platform, world_size)}: right, 4 MiB in {1000 * slowest:.1f} ms")


def reduce_on_rank(rank: int, world_size: int, folder: str) -> None:
    """Each rank brings its number, counted from 1, many times over."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    platform = join(rank, world_size, folder)
    numbers = torch.full((NUMBERS,), float(rank + 1), device=platform.current_device())
    for _ in range(2):  # the first one connects
        total = numbers.clone()
        platform.synchronize()
        start = time.perf_counter()
        dist.all_reduce(total)
        platform.synchronize()
        seconds = time.perf_counter() - start
    low, high = (float(value) for value in total.aminmax())
    Path(folder, f"total-{rank}").write_text(str(low if low == high else float("nan")))
    Path(folder, f"seconds-{rank}").write_text(str(seconds))


def join(rank: int, world_size: int, folder: str) -> Platform:
    """Join the ranks of this machine, which find each other by a file."""
    platform = detect()
    platform.bind_rank(rank)
    dist.init_process_group(
        platform.collective_backend,
        store=FileStore(os.path.join(folder, "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )
    return platform


def _over(platform: Platform, world_size: int) -> str:
    backend = "NCCL" if platform.device_type == "cuda" else shared_memory.means()
    return f"{world_size} {'ranks' if world_size > 1 else 'rank'} over {backend}"


def _remedy(platform: Platform) -> str:
    return NCCL_REMEDY if platform.device_type == "cuda" else GLOO_REMEDY
