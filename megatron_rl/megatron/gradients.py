"""The buffers in which Megatron-Core's DDP adds up and reduces gradients."""

from typing import Any

import torch
from torch import Tensor


class MainGrad:
    """The main_grad of a parameter: a buffer that its gradient is added to outside of autograd."""

    def __init__(self, parameter: Any) -> None:
        if getattr(parameter, "main_grad", None) is None:
            raise ValueError(
                "parameter has no main_grad: wrap its module in Megatron's "
                "DistributedDataParallel, or let autograd carry its gradient"
            )
        self._parameter = parameter

    @property
    def total(self) -> Tensor:
        main_grad: Tensor = self._parameter.main_grad
        return main_grad

    def hand_over(self) -> Tensor | None:
        """An empty gradient for autograd, or none where an embedding shares the parameter.

        The flag tells Megatron's hook that main_grad holds the gradient already. The hook must
        still run in the order of the backward, since other ranks wait in its collectives, and
        without any gradient it would run on another thread. A sparse one without entries takes no
        memory; where an embedding shares the parameter, its own gradient makes the hook run.
        """
        parameter = self._parameter
        parameter.grad_added_to_main_grad = True
        if getattr(parameter, "zero_out_wgrad", False):
            return None
        return torch.zeros(
            parameter.shape,
            dtype=parameter.dtype,
            device=parameter.device,
            layout=torch.sparse_coo,
        )
