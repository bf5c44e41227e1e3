"""Collectives of ranks on this machine's CPUs, over gloo and in shared memory, in turns.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/collectives.py [--turns 11]

Rank 0 prints a table: the median of all turns, in microseconds a call.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel import shared_memory

SIZES = (256, 4096, 65_536, 1 << 20, 1 << 24)  # bytes that a rank brings
BACKENDS = ("gloo", shared_memory.NAME)


def collectives(numbers: Tensor, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    world = dist.get_world_size(group)
    gathered = numbers.new_empty(world * numbers.numel())
    part = numbers.new_empty(numbers.numel() // world)
    return {
        "all-reduce": lambda: dist.all_reduce(numbers, group=group),
        "all-gather": lambda: dist.all_gather_into_tensor(gathered, numbers, group=group),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, numbers, group=group),
        "broadcast": lambda: dist.broadcast(numbers, 0, group=group),
        "all-to-all": lambda: dist.all_to_all_single(
            torch.empty_like(numbers), numbers, group=group
        ),
    }


def seconds_of(call: Callable[[], object], calls: int) -> float:
    call()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=11)
    turns = parser.parse_args().turns
    dist.init_process_group(shared_memory.NAME)
    groups = {name: dist.new_group(backend=name) for name in BACKENDS}
    is_first = dist.get_rank() == 0
    if is_first:
        print("| collective | bytes of a rank | gloo, us | shared memory, us | ratio |")
        print("|---|---|---|---|---|")
    for size in SIZES:
        world = dist.get_world_size()
        numbers = torch.zeros(size // 4 // world * world)
        made = {name: collectives(numbers, group) for name, group in groups.items()}
        for kind in made["gloo"]:
            taken: dict[str, list[float]] = {name: [] for name in BACKENDS}
            for _ in range(turns):
                for name in BACKENDS:
                    calls = max(3, min(100, (1 << 24) // size))
                    taken[name].append(seconds_of(made[name][kind], calls))
            gloo, shared = (statistics.median(taken[name]) * 1e6 for name in BACKENDS)
            if is_first:
                print(f"| {kind} | {size:,} | {gloo:,.0f} | {shared:,.0f} | {gloo / shared:.1f} |")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
