"""Where a process stands: asked of itself, or from outside of one that cannot answer."""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ASK = signal.SIGUSR2
SECONDS_TO_WRITE = 0.5
WAITING = ("/torch/distributed/", "/pipeline_parallel/p2p_communication.py", "/vllm/distributed/")
"""Parts of the files whose functions wait for other ranks."""

STATES = {
    "R": "computes",
    "S": "sleeps in the kernel",
    "D": "waits for a disk or a device",
    "T": "was stopped by a signal",
    "t": "was stopped by a debugger",
    "Z": "has ended",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A rank's process."""

    host: str
    pid: int
    stack_file: str
    """Where it writes its stacks when it gets the signal ASK, even from a loop in C."""

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def has_ended(self) -> bool:
        """True where it is gone; only on its own machine."""
        return state_of(self.pid) in ("", "Z")


def this_process() -> Process:
    """This process, which answers ASK from now on; main thread only."""
    # A file in memory, which ends with the process, and which others read by way of it.
    descriptor = os.memfd_create("stacks")
    faulthandler.register(ASK, file=descriptor, all_threads=True)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    return Process(host=socket.gethostname(), pid=os.getpid(), stack_file=path)


def own_stack() -> tuple[list[str], bool]:
    """The main thread's stack, one line a call, innermost last, and whether it waits for ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = traceback.extract_stack(frame)
    lines = [f"{call.filename}:{call.lineno} in {call.name}" for call in calls]
    is_waiting = any(part in call.filename for call in calls[-4:] for part in WAITING)
    return lines, is_waiting


def look_at(process: Process) -> list[str]:
    """What can be seen of another process of this machine: its state, and its stacks if it can."""
    state = state_of(process.pid)
    said = [f"process {process.pid} {STATES.get(state, 'is gone')} and does not answer"]
    path = Path(process.stack_file)
    with contextlib.suppress(OSError):
        before = path.stat().st_size
        os.kill(process.pid, ASK)
        time.sleep(SECONDS_TO_WRITE)
        said += path.read_text(errors="replace")[before:].splitlines()
    with contextlib.suppress(OSError):
        said.append(f"kernel: {Path(f'/proc/{process.pid}/wchan').read_text() or 'running'}")
    return said


def state_of(pid: int) -> str:
    """The state of a process, a letter of STATES; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
