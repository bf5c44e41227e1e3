"""The two sides of a job whose first ranks train and whose last ones only sample.

Megatron-Core and vLLM take the default process group for the whole of what they run on. So each
side has a default group of its own, with ranks counted from 0, and torchrun's variables are changed
to say the same. What crosses between the sides goes over groups of the whole job, which torch does
not know as parts of a world: collectives take them, and their rank is asked of themselves.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist

from megatron_rl.parallel.place import JOB_RANK, JOB_SIZE, job_rank, job_size

PATIENCE = timedelta(days=30)
"""One side waits for the other as long as that works; the watchdog knows whether it does."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """The side of a job that this rank is on."""

    name: Literal["all", "training", "sampling"]
    rank: int  # in the side
    size: int
    job_rank: int
    job_size: int

    @property
    def is_main(self) -> bool:
        """True on the one rank of the job that writes and speaks."""
        return self.job_rank == 0

    @property
    def trainers(self) -> int:
        """Ranks that train."""
        return self.job_size - self.size if self.name == "sampling" else self.size


@dataclass(frozen=True, kw_only=True)
class Job:
    """The groups over all ranks of a job that has two sides."""

    side: Side
    world: dist.ProcessGroup  # for CPU tensors and objects
    bridge: dist.ProcessGroup  # weight sync
    nodes: tuple[int, ...]  # of every rank, the number of its node

    @property
    def samplers(self) -> int:
        """Ranks that only sample."""
        return self.side.job_size - self.side.trainers


def take_side(separate_ranks: int) -> Side:
    """Take this rank's side, of which the environment tells from then on.

    separate_ranks: of the job, its last ones, which only sample; 0: there is one side.
    """
    rank, size = job_rank(), job_size()
    if not separate_ranks:
        return Side(name="all", rank=rank, size=size, job_rank=rank, job_size=size)
    trainers = size - separate_ranks
    os.environ.update({JOB_RANK: str(rank), JOB_SIZE: str(size)})
    side = Side(name="training", rank=rank, size=trainers, job_rank=rank, job_size=size)
    if rank >= trainers:
        side = Side(
            name="sampling",
            rank=rank - trainers,
            size=separate_ranks,
            job_rank=rank,
            job_size=size,
        )
    os.environ.update({"RANK": str(side.rank), "WORLD_SIZE": str(side.size)})
    return side
