"""What a rehearsed rank holds and waits for, written down op by op."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""Bytes to which torch's allocator of GPU memory rounds every tensor."""

OWN = Path(__file__).parent


class Storages(TorchDispatchMode):
    """The memory of tensors of one kind of device, as they come and go."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.held = 0  # bytes of the device now
        self.peak = 0  # most of them since the last mark
        self._device_type = device_type
        self._sizes: dict[int, int] = {}

    def mark(self) -> int:
        """Begin to look for a peak; returns what is held."""
        self.peak = self.held
        return self.held

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._see(result)
        return results

    def __enter__(self) -> "Storages":
        storages: Any = torch.UntypedStorage
        stock = self._stock_resize = storages.resize_

        def resize_(storage: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
            resized: torch.UntypedStorage = stock(storage, nbytes)
            self._look_again(storage)
            return resized

        storages.resize_ = resize_  # which is no op, and so goes by unseen
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        storages: Any = torch.UntypedStorage
        storages.resize_ = self._stock_resize
        super().__exit__(*error)

    def _look_again(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            former, self._sizes[key] = self._sizes[key], _rounded(storage)
            self._change(self._sizes[key] - former)

    def _see(self, tensor: Tensor) -> None:
        if not self._is_here(tensor) or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        former = self._sizes.get(key, 0)
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self._sizes[key] = _rounded(storage)
        self._change(self._sizes[key] - former)

    def _forget(self, key: int) -> None:
        self._change(-self._sizes.pop(key))

    def _change(self, nbytes: int) -> None:
        self.held += nbytes
        self.peak = max(self.peak, self.held)

    def _is_here(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._device_type


class Ledger(Storages):
    """The memory of a device that has no numbers, and where the host would wait for them.

    A number that the host reads is 1. Numbers of the host's own stay what they are.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__(device_type)
        self.waits: Counter[str] = Counter()  # place -> times, where the host waits for the device
        self.share_selected = 1.0  # of a mask's entries, those that are taken to be set
        self._counts_waits = False

    @contextmanager
    def looking_for_waits(self) -> Iterator[None]:
        """Inside, places where the host waits for the device are written down."""
        former, self._counts_waits = self._counts_waits, True
        try:
            yield
        finally:
            self._counts_waits = former

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_local_scalar_dense" and _is_unknown(args[0]):
            self._wait(args[0])
            return _one(args[0].dtype)
        if name == "aten::masked_select":  # its size would be asked of the device
            self._wait(args[0])
            return args[0].new_empty(round(args[1].numel() * self.share_selected))
        if name == "aten::_to_copy":
            if self._leaves_device(args[0], kwargs):
                self._wait(args[0])
            elif not _is_unknown(args[0]) and self._is_own(kwargs.get("device")):
                # What has numbers would be computed with them, on a device that has no memory.
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.empty(args[0].shape, dtype=dtype, device=kwargs["device"])
        if name == "aten::copy_" and self._is_here(args[1]) and not self._is_here(args[0]):
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if not non_blocking:
                self._wait(args[1])
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _leaves_device(self, source: Any, settings: Any) -> bool:
        leaves = settings.get("device") is not None and not self._is_own(settings["device"])
        return leaves and self._is_here(source) and not settings.get("non_blocking")

    def _is_own(self, device: Any) -> bool:
        return device is not None and torch.device(device).type == self._device_type

    def _wait(self, tensor: Any) -> None:
        if self._counts_waits and self._is_here(tensor):
            self.waits[_place()] += 1


def _rounded(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // BLOCK) * BLOCK


def _is_unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _place() -> str:
    """file:line of the program or of Megatron-Core that is being run."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        parts = path.parts
        for package in ("megatron_rl", "megatron"):
            if package in parts and OWN not in path.parents:
                at = len(parts) - 1 - parts[::-1].index(package)
                return f"{'/'.join(parts[at:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"
