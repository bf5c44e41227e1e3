"""Copies of tensors in host memory, for a save that goes on while the models are trained."""

from torch import Tensor, empty


class HostCopies:
    """Makes copies of tensors; one that is asked for twice is copied once."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The values of a tensor, contiguous, on the CPU."""
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._made:
            copy = empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            # With the original, whose address no other tensor may take while copies are made.
            self._made[key] = (tensor, copy)
        return self._made[key][1]
