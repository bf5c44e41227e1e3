"""Bytes of a device's tensors in host memory, pinned beside a GPU, so that copies run at its speed.

On a CPU the host's copy is a second one in the same memory: the same code runs, and saves nothing.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

PIECE = 2**28
"""Bytes of a piece of host memory: a power of two, to which torch rounds pinned memory up, so that
nothing is lost."""

ALIGNMENT = 64  # bytes, of a copy in a piece


class HostBytes:
    """The bytes of some tensors, end to end in host memory that is kept for the next time."""

    def __init__(self, device_type: str) -> None:
        self._is_pinned = device_type == "cuda"
        self._pieces: list[Tensor] = []

    def keep(self, parts: Sequence[Tensor]) -> None:
        """Copy contiguous tensors here. On a GPU the copy is queued, not awaited."""
        missing = sum(map(_size, parts)) - sum(map(len, self._pieces))
        while missing > 0:
            if self._pieces and len(self._pieces[-1]) < PIECE:
                missing += len(self._pieces.pop())
            size = min(missing, PIECE)
            self._pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._is_pinned))
            missing -= size
        for here, there in self._spans(parts):
            here.copy_(there, non_blocking=self._is_pinned)

    def give(self, parts: Sequence[Tensor]) -> None:
        """Write the bytes into contiguous tensors of the same sizes, in the same order; queued,
        likewise.
        """
        for here, there in self._spans(parts):
            there.copy_(here, non_blocking=self._is_pinned)

    def _spans(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(bytes here, bytes of a tensor), cut where a piece or a tensor ends."""
        at = 0
        for part in parts:
            left = _bytes_of(part)
            while len(left):
                piece, start = divmod(at, PIECE)
                here = self._pieces[piece][start : start + len(left)]
                yield here, left[: len(here)]
                left, at = left[len(here) :], at + len(here)


def host_copies(tensors: Mapping[str, Tensor], device_type: str) -> dict[str, Tensor]:
    """Copies of tensors in host memory, several in a piece; one larger than a piece has its own."""
    is_pinned = device_type == "cuda"
    copies: dict[str, Tensor] = {}
    piece, at = torch.empty(0, dtype=torch.uint8), 0
    left = sum(_size(tensor) + ALIGNMENT for tensor in tensors.values())
    for name, tensor in tensors.items():
        size = _size(tensor)
        if at + size > len(piece):
            length = max(size, min(left, PIECE))
            piece, at = torch.empty(length, dtype=torch.uint8, pin_memory=is_pinned), 0
        copies[name] = piece[at : at + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        at, left = at + taken, left - taken
    return copies


class StorageAway:
    """Memory of a device that can be freed while its bytes wait in host memory.

    Tensors, and all views of them, stay what they are: they have no memory meanwhile, and must not
    be read.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type, self._host = device_type, HostBytes(device_type)
        self._away: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def is_away(self) -> bool:
        return bool(self._away)

    def leave(self, tensors: Iterable[Tensor], *, besides: Iterable[Tensor] = ()) -> None:
        """Free the memory of tensors, but what they share with others, which stay.

        On a GPU the copies are queued, and what reuses the memory is queued behind them.
        """
        assert not self._away
        staying = {storage._cdata for storage in map(_storage, besides)}
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = _storage(tensor)
            is_here = tensor.device.type == self._device_type and storage.nbytes()
            # numpy has seen it, on a CPU: then its memory is no longer torch's to free.
            is_here = is_here and storage.resizable()
            if is_here and storage._cdata not in staying:
                found.setdefault(storage._cdata, storage)
        storages = list(found.values())
        self._host.keep([_whole(storage) for storage in storages])
        self._away = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def come_back(self) -> None:
        """Give the tensors their memory and their values again; nothing where they have them."""
        for storage, nbytes in self._away:
            storage.resize_(nbytes)
        self._host.give([_whole(storage) for storage, _ in self._away])
        self._away = []


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _whole(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes_of(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    return tensor.detach().view(-1).view(torch.uint8)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
