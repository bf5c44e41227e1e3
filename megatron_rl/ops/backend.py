"""The implementation of an op that runs: chosen once by the run's config, asked at every call."""

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError, ConfigErrors
from megatron_rl.ops import native
from megatron_rl.ops.config import Backend

_chosen: Backend = "auto"


def choose(backend: Backend, device: torch.device) -> str:
    """Decide for this process; returns one line about what will run on the device.

    Raises:
        ConfigErrors: native ops are asked for and were not compiled for the device.
    """
    global _chosen
    if backend == "native" and not native.has("row_stats", device):
        way_out = f"Set ops.backend=auto, or install again with MEGATRON_RL_CSRC={device.type}"
        problem = ConfigError("ops.backend", backend, f"no native ops: {_missing(device)}", way_out)
        raise ConfigErrors([str(problem)])
    _chosen = backend
    if backend == "reference":
        return "ops: PyTorch definitions"
    if native.has("row_stats", device):
        return f"ops: native, {device.type}"
    return f"ops: PyTorch definitions; no native ops: {_missing(device)}"


def chosen() -> Backend:
    """The backend that choose was last given."""
    return _chosen


def is_native(op: str, tensor: Tensor, *, any_dtype: bool = False) -> bool:
    """True where op runs natively on a tensor of this device and dtype, whatever its shape.

    any_dtype: the tensor is not of logits, and only its device counts.

    Raises:
        TypeError: native ops were asked for, and this one does not take the tensor.
    """
    if _chosen == "reference":
        return False
    if native.has(op, tensor.device) if any_dtype else native.takes(op, tensor):
        return True
    if _chosen == "native":
        raise TypeError(
            f"ops.backend=native: {op} is not compiled for {tensor.dtype} on "
            f"{tensor.device.type}; set ops.backend=auto"
        )
    return False


def _missing(device: torch.device) -> str:
    return native.FAULT or f"the extension was compiled without {device.type}"
