"""A polite end: a signal asks all ranks to stop together, and what is done is saved.

SIGTERM is torchrun's and most schedulers' signal, SIGUSR1 is Slurm's where a job asks for it
(`--signal=USR1@600`), SIGINT is Ctrl-C. The kernel sends SIGTERM to a rank whose torchrun has died.
"""

import ctypes
import os
import signal
import sys
import time

import torch.distributed as dist

from megatron_rl.parallel.collectives import max_over

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_OF_ONE_CTRL_C = 2.0  # the terminal sends it to every rank, and torchrun passes it on
PR_SET_PDEATHSIG = 1  # prctl(2)


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
    if os.getppid() != launcher:  # it died before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)
