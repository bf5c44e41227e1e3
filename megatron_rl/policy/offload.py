"""The trainer leaves the device while the engine generates, and comes back by itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_rl.megatron.config import Offload
from megatron_rl.parallel.groups import Groups

if TYPE_CHECKING:  # it imports Megatron-Core, which must be entered first
    from megatron_rl.megatron.model import TrainedModel


class OffloadedTrainer:
    """The models of this rank beside its engine; what they need, they bring back themselves."""

    def __init__(self, offload: Offload, models: Sequence["TrainedModel"], groups: Groups) -> None:
        """offload: which part leaves. models: policy, critic, and a reference of its own."""
        self.offload, self._models, self._groups = offload, models, groups

    def state_leaves(self) -> None:
        """Free gradients, main weights and optimizer state, which only an update needs."""
        if self.offload != "none":
            for model in self._models:
                model.residence.state_leaves()
            self._groups.platform.give_back_device_memory()

    def leaves(self) -> None:
        """Free all that leaves, on all ranks before any goes on; every rank calls it.

        The ranks of an engine take their memory at the same time.
        """
        self.state_leaves()
        if self.offload == "weights":
            for model in self._models:
                model.residence.weights_leave()
            self._groups.platform.give_back_device_memory()
        if self.offload != "none":
            dist.barrier(group=self._groups.world)

    def line(self) -> str:
        """What is said of it at the start of a run."""
        where = "host memory while the engine generates"
        if self.offload == "none":
            return "offload: nothing of the trainer leaves the device while the engine generates"
        if self.offload == "weights":
            return f"offload: weights, gradients, main weights and optimizer state go to {where}"
        return f"offload: main weights and optimizer state go to {where}, gradients are freed"
