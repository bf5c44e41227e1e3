"""Which parts of a model are on the device, and which wait in host memory until they are needed.

Gradients are freed by the stock calls of Megatron-Core's DDP: their views stay, and they come back
as zeros. Its call for an optimizer makes new tensors instead, which are not pinned, cost float32
weights the buffer that they are views of, and on a CPU free nothing
(faults.py, optimizer_offload_by_copies); its call for weights knows the distributed optimizer's
buffers only. Here the memory of both is freed under the tensors, which is the same for every
optimizer, and on a CPU.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron_rl.platforms.host_bytes import StorageAway


class Residence:
    """The weights, gradients and optimizer state of a model of this rank.

    What leaves is said by others; what needs a part brings it back, which is free where it is here.
    """

    def __init__(self, chunks: list[Any], device_type: str) -> None:
        self._chunks, self._device_type = chunks, device_type
        self._weights = StorageAway(device_type)
        self._state = StorageAway(device_type)
        self._trained: list[Any] = []
        self._optimizer: Any = None
        self._has_state = True

    def trains(self, modules: list[Any], optimizer: Any) -> None:
        """The model is trained from now on: its modules in DDP, and its optimizer."""
        self._trained, self._optimizer = modules, optimizer

    def state_leaves(self) -> None:
        """Free gradients, main weights, and what the optimizer remembers."""
        if self._optimizer is None:
            return
        if self._has_state:
            gradients = [buffer.grad_data for m in self._trained for buffer in _buffers(m)]
            stay = [*self._parameters(), *gradients]  # the optimizer may have views of them
            self._state.leave(self._of_optimizer(), besides=stay)
            self._has_state = False
        for module in self._trained:
            module.offload_grad_buffers(empty_cache=False)

    def weights_leave(self) -> None:
        """Free the weights, after all that may be a view of them."""
        self.state_leaves()
        if not self._weights.is_away:
            self._weights.leave(self._parameters())

    def bring_weights(self) -> None:
        self._weights.come_back()

    def bring_gradients(self) -> None:
        """Gradients, of zeros where they were away."""
        for module in self._trained:
            module.restore_grad_buffers(synchronize=False)

    def bring_state(self) -> None:
        """Main weights, and what the optimizer remembers."""
        self._state.come_back()
        self._has_state = True

    def _parameters(self) -> Iterator[Tensor]:
        for chunk in self._chunks:
            yield from chunk.parameters()

    def _of_optimizer(self) -> Iterator[Tensor]:
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = part.optimizer
            if inner is None:  # a rank without a parameter of this kind
                continue
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _buffers(module: Any) -> list[Any]:
    return [*module.buffers, *module.expert_parallel_buffers]
