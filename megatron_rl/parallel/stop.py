"""A polite end: SIGTERM asks all ranks to stop together after the iteration at hand."""

import signal

import torch.distributed as dist

from megatron_rl.parallel.collectives import max_over


class StopRequest:
    """Remembers that this rank was told to stop, and finds out whether any rank was.

    The handler only sets a flag, so nothing is interrupted. A scheduler and torchrun may both pass
    the signal on, so a second signal changes nothing; torchrun kills ranks that outlast its own
    time limit.
    """

    def __init__(self) -> None:
        self._was_told = False

    def listen(self) -> None:
        """Handle SIGTERM from now on; main thread only."""
        signal.signal(signal.SIGTERM, self._note)

    def agreed(self, group: dist.ProcessGroup) -> bool:
        """True on every rank where any rank was told to stop; one small all-reduce."""
        return max_over([float(self._was_told)], group)[0] > 0

    def _note(self, _number: int, _frame: object) -> None:
        self._was_told = True
