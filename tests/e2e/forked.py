"""A command on ranks that fork from the harness' server, which has imported what is slow.

A start as a user makes it imports torch, Megatron-Core and transformers in torchrun and in each of
its ranks, which takes several times as long as six iterations of a tiny model. What torchrun or an
import decides is for `Runs.start`.
"""

import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

GRACE_S = 10.0  # that the other ranks have, once one has failed


def run_command(
    arguments: list[str],
    ranks: int,
    folder: Path,
    environment: dict[str, str],
    program: Path | None = None,
) -> tuple[int, str]:
    """Exit code, of several ranks as torchrun has it, and everything printed.

    program: a script; without one, the command `megatron-rl`.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    layout = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port, "GROUP_RANK": 0}
    context = harness.server()
    with tempfile.NamedTemporaryFile("r") as said:
        processes = []
        for rank in range(ranks):
            own = layout | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            variables = {name: str(value) for name, value in own.items()} if ranks > 1 else {}
            own_environment = dict(os.environ) | environment | variables
            args = (program, arguments, folder, own_environment, said.name)
            processes.append(context.Process(target=_rank, args=args))
        with harness.our_path_for_the_server():
            for process in processes:
                process.start()
        harness.wait_for_all(processes, time.monotonic() + harness.STUCK_S, GRACE_S)
        codes = [process.exitcode for process in processes]
        text = Path(said.name).read_text()
    return (codes[0] or 0) if ranks == 1 else int(any(codes)), text


def _rank(
    program: Path | None,
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    said: str,
) -> None:
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)  # what OMP_NUM_THREADS does to a process that starts with it

    if program is not None:
        sys.argv = [str(program), *arguments]
        runpy.run_path(str(program), run_name="__main__")
        return

    from megatron_rl.commands.main import main

    sys.exit(main(arguments))
