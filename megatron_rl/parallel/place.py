"""This rank's place among all that torchrun started, as its variables tell; without torch."""

import os

JOB_RANK, JOB_SIZE = "MEGATRON_RL_JOB_RANK", "MEGATRON_RL_JOB_SIZE"
"""The place in the job, where RANK and WORLD_SIZE say that in the side."""


def job_rank() -> int:
    """This rank among all that torchrun started; 0 in a lone process."""
    return int(os.environ.get(JOB_RANK) or os.environ.get("RANK", "0"))


def job_size() -> int:
    """How many ranks torchrun started."""
    return int(os.environ.get(JOB_SIZE) or os.environ.get("WORLD_SIZE", "1"))
