"""A save that goes on beside the training."""

import threading
from collections.abc import Callable

import torch.distributed as dist

from megatron_rl.parallel.collectives import agree_or_raise, max_over


class Background:
    """Work in a thread of its own on every rank; ranks ask after it together."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: Exception | None = None
        # A daemon, since a run that fails must not wait for its disk.
        self._thread = threading.Thread(target=self._do, name="checkpoint", daemon=True)
        self._thread.start()

    def is_over(self, group: dist.ProcessGroup) -> bool:
        """True where it is over on all ranks; every rank of group calls it.

        group must be another than those that the work uses. It does not wait for the work: of a
        part that fails alone, so that others wait for it, all ranks learn here.

        Raises:
            Exception: of the work; RunError on ranks whose own part did not fail.
        """
        is_running = self._thread.is_alive()
        failed, running = max_over([self._error is not None, is_running], group)
        if failed:
            agree_or_raise(self._error, group)
        return not running

    def _do(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._error = error
