"""What the machine has room for: shared memory, files, ports, names, disk, memory."""

import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from megatron_rl.doctor.check import Result, failed, ok, warning
from megatron_rl.platforms.host_memory import available_bytes

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED = GIB  # Docker gives 64 MiB, of which an engine or NCCL may find too little
ENOUGH_FILES, LEAST_FILES = 4096, 256
ENOUGH_DISK, LEAST_DISK = 20 * GIB, GIB
ENOUGH_MEMORY, LEAST_MEMORY = 4 * GIB, GIB


def check_shared_memory(directory: Path = SHARED_MEMORY) -> Result:
    remedy = f"sudo mount -o remount,size=16G {directory}  # of a container: --shm-size=16g"
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return failed(f"{directory}: {error.strerror}", f"sudo mount -t tmpfs tmpfs {directory}")
    if not os.access(directory, os.W_OK):
        return failed(f"{directory} cannot be written to", f"sudo chmod 1777 {directory}")
    text = f"{_gib(free)} free in {directory}"
    return (
        ok(text) if free >= ENOUGH_SHARED else warning(f"{text}, which may be too little", remedy)
    )


def check_open_files(limits: tuple[int, int] | None = None) -> Result:
    """limits: what this process may have and what it may ask for."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_FILES:
        return ok("no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}")
    may_ask = hard == resource.RLIM_INFINITY or hard >= ENOUGH_FILES
    command = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)}"
    remedy = command if may_ask else f"sudo prlimit --pid $$ --nofile={65536}"
    text = f"up to {soft}, fewer than {ENOUGH_FILES}"
    return warning(text, remedy) if soft >= LEAST_FILES else failed(text, remedy)


def check_port(host: str = "127.0.0.1") -> Result:
    """A free port, and a connection to it."""
    try:
        with socket.create_server((host, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((host, port), timeout=5):
                return ok(f"{host}:{port} was free, and took a connection")
    except OSError as error:
        return failed(f"{host} takes no connection: {error}", "sudo ip link set lo up")


def check_localhost() -> Result:
    remedy = "echo '127.0.0.1 localhost' | sudo tee -a /etc/hosts"
    try:
        found = {str(address[0]) for *_, address in socket.getaddrinfo("localhost", None)}
    except OSError as error:
        return failed(f"localhost has no address: {error}", remedy)
    text = ", ".join(sorted(found))
    if not found & {"127.0.0.1", "::1"}:
        return failed(f"localhost is {text}, which is not this machine", remedy)
    return ok(text)


def check_disk(directory: Path) -> Result:
    """Of the nearest directory that is there, since a run makes its own."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    remedy = f"df -h {there}  # and make room, or name another run.output_dir"
    if not there.is_dir() or not os.access(there, os.W_OK):
        owner = f"sudo chown $(id -u) {there}  # or name another run.output_dir"
        return failed(f"{there} is no directory to write to", owner)
    free = shutil.disk_usage(there).free
    text = f"{_gib(free)} free in {there}"
    if free < LEAST_DISK:
        return failed(f"{text}: not even a small run's checkpoints fit", remedy)
    if free < ENOUGH_DISK:
        return warning(f"{text}: a few checkpoints of a large model fill it", remedy)
    return ok(text)


def check_memory(find: Callable[[], int | None] = available_bytes) -> Result:
    free, remedy = find(), "ps -eo rss,pid,args --sort=-rss | head  # and end what is not needed"
    if free is None:
        return ok("nothing here says it")
    text = f"{_gib(free)} free"
    if free < LEAST_MEMORY:
        return failed(f"{text}: a run of any size needs more", remedy)
    if free < ENOUGH_MEMORY:
        return warning(f"{text}: an engine beside a trainer may need more", remedy)
    return ok(text)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
