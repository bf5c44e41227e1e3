"""A polite end: a signal asks all ranks to stop together, and what is done is saved.

SIGTERM is torchrun's and most schedulers' signal, SIGUSR1 is Slurm's where a job asks for it
(`--signal=USR1@600`), SIGINT is Ctrl-C. The kernel sends SIGTERM to a rank whose torchrun has died.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_rl.parallel.collectives import max_over

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_OF_ONE_CTRL_C = 2.0  # the terminal sends it to every rank, and torchrun passes it on
PR_SET_PDEATHSIG = 1  # prctl(2)
# What torchrun calls its time limit, and what it is where nobody sets it.
TIME_LIMIT, TIME_LIMIT_VARIABLE = "--shutdown-timeout", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SECONDS_OF_TORCHRUN = 30.0


class StopRequest:
    """Remembers that this rank was told to stop, and finds out whether any rank was.

    The handler only sets a flag, so nothing is interrupted. A scheduler and torchrun may both pass
    a signal on, so a second one changes nothing, but for a later Ctrl-C, which ends the process at
    once. torchrun kills ranks that outlast its own time limit.
    """

    def __init__(self) -> None:
        self._told_at: float | None = None

    @property
    def was_told(self) -> bool:
        """True where this rank was; another one may have been."""
        return self._told_at is not None

    def listen(self) -> None:
        """Handle the signals from now on; main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def agreed(self, group: dist.ProcessGroup) -> bool:
        """True on every rank where any rank was told to stop; one small all-reduce."""
        return max_over([float(self.was_told)], group)[0] > 0

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
        elif number == signal.SIGINT and now > self._told_at + SECONDS_OF_ONE_CTRL_C:
            raise KeyboardInterrupt


class DeafToStop(StopRequest):
    """Of a rank that ends when another one tells it to: it must not end by itself, nor break off.

    A signal goes to all ranks of a job, and those that lead it hear of it.
    """

    def agreed(self, group: dist.ProcessGroup) -> bool:
        return False

    def _note(self, number: int, _frame: object) -> None:
        pass


def follow_launcher() -> None:
    """Have the kernel send SIGTERM to this rank when the torchrun that started it is gone.

    A rank that somebody started by hand may outlive its shell, as `nohup` has it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # It may have died before the kernel was asked, or while this rank imported its modules.
    if os.getppid() != launcher or not _has_torch(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


def _has_torch(pid: int) -> bool:
    """Whether a process has loaded torch, as every torchrun has; an orphan's new parent has not.

    A process of another user, whose libraries one may not see, is no launcher of ours.
    """
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except PermissionError:
        return False
    except OSError:  # without /proc nothing is known, and a launcher that has just died is noticed
        return True


def seconds_to_stop() -> float | None:
    """Seconds from the signal that torchrun passes on to the SIGKILL; None: nobody kills.

    torchrun does not tell its ranks, so its command line is read.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    arguments: list[str] = []
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace")
        arguments = command.replace("=", "\0").split("\0")
    names = [argument.replace("_", "-") for argument in arguments]
    given = os.environ.get(TIME_LIMIT_VARIABLE, "")
    if TIME_LIMIT in names[:-1]:
        given = arguments[names.index(TIME_LIMIT) + 1]
    try:
        return float(given)
    except ValueError:
        return SECONDS_OF_TORCHRUN
