"""What checks of the tests do in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_rl.doctor.check import Result, failed, ok

PIDS = "DOCTOR_TEST_PIDS"


def works() -> Result:
    return ok(f"RANK={os.environ.get('RANK')}")


def finds_a_fault() -> Result:
    return failed("a fault", "its own remedy")


def raises() -> Result:
    raise ValueError("two\nlines")


def crashes() -> Result:
    os.write(1, b"about to crash\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    return ok("never")


def hangs() -> Result:
    """Together with a process that it started; both say who they are."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    os.write(1, b"waiting\n")
    Path(os.environ[PIDS]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return ok("never")


def hangs_in_a_collective() -> Result:
    from megatron_rl.doctor.ranks import check_all_reduce

    return check_all_reduce(body=one_rank_stays_away)


def one_rank_stays_away(rank: int, world_size: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from megatron_rl.doctor.ranks import join

    Path(f"{os.environ[PIDS]}-{rank}").write_text(str(os.getpid()))
    join(rank, world_size, folder)
    if rank == 0:
        dist.all_reduce(torch.ones(3))
    time.sleep(600)
