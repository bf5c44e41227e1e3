"""Real process groups on CPU, which meet in shared memory as runs do.

Ranks fork from one server that has imported torch already."""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel import shared_memory  # noqa: F401  (a backend by its name)
from megatron_rl.platforms.base import CPU

PRELOAD = ["torch", "torch.distributed", "torch._dynamo"]
"""What the server imports before it forks; a conftest.py may append to it."""

GRACE_S = 5.0
STUCK_S = 900.0  # far from what any test takes, on a busy machine too


@contextmanager
def preloaded(module: str) -> Iterator[None]:
    """Ranks started inside come from a server that has imported module too."""
    if module in PRELOAD:
        yield
        return
    PRELOAD.append(module)
    forkserver._forkserver._stop()  # the next rank starts a new one
    try:
        yield
    finally:
        PRELOAD.remove(module)
        forkserver._forkserver._stop()


def asked_for(request: pytest.FixtureRequest, *arguments: str) -> list:
    """The values of an argument, or of several together, over the tests of this module that are to
    run: ranks then measure what is asked for and no more."""
    found = {}
    for item in request.session.items:
        values = getattr(item, "callspec", None) and item.callspec.params
        if item.path == request.path and values and set(arguments) <= set(values):
            value = tuple(values[name] for name in arguments)
            found[item.nodeid] = value if len(arguments) > 1 else value[0]
    return list(found.values())


def server() -> multiprocessing.context.ForkServerContext:
    """What starts processes that have imported all of PRELOAD."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def run_on_ranks(
    world_size: int, fn: Callable[..., None], *args: object, timeout_s: float = STUCK_S
) -> None:
    """Run fn(*args) on ranks of this machine, one thread each.

    An exception or a time-out on any rank fails the test with every failing rank's traceback, the
    first to fail first. fn must be importable: a function at the head of its module.
    """
    context = server()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, folder, timeout_s, fn, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        with our_path_for_the_server():
            for process in ranks:
                process.start()
        wait_for_all(ranks, deadline=time.monotonic() + timeout_s + GRACE_S)
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode != 0]
        assert not failed, _report(Path(folder), failed, world_size)


@contextmanager
def our_path_for_the_server() -> Iterator[None]:
    """Python 3.11 gives the server no sys.path; what it cannot import it leaves out silently."""
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        if inherited is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = inherited


def wait_for_all(ranks: list, deadline: float, grace_s: float = GRACE_S) -> None:
    """Until all have ended; once one has failed, the others have grace_s left."""
    running = list(ranks)
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running], timeout=deadline - time.monotonic())
        if any(process.exitcode for process in running):
            deadline = min(deadline, time.monotonic() + grace_s)
        running = [process for process in running if process.exitcode is None]
    for process in running:
        process.kill()
        process.join()


def _report(folder: Path, failed: list[int], world_size: int) -> str:
    told = sorted(folder.glob("rank*.txt"), key=lambda path: path.stat().st_mtime_ns)
    stories = [f"--- {path.stem}\n{path.read_text()}" for path in told if path.stat().st_size]
    return "\n".join([f"failed: ranks {failed} of {world_size}", *stories])


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
    fn: Callable[..., None],
    args: tuple[object, ...],
) -> None:
    with open(Path(folder, f"rank{rank}.txt"), "w") as story:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=story)
        try:
            torch.set_num_threads(1)
            dist.init_process_group(
                CPU.collective_backend,
                store=dist.FileStore(str(Path(folder, "store")), world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            fn(*args)
            dist.barrier()
        except BaseException:
            traceback.print_exc(file=story)
            story.flush()
            os._exit(1)  # a group that lost a rank may hang in its destructor
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
