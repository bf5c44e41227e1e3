"""safetensors files by positioned reads and writes, a rectangle at a time.

The format (https://huggingface.co/docs/safetensors#format) is 8 bytes of header length,
little-endian, then a JSON header, then the tensors. Nothing is mapped into memory: mapped pages
count as resident until they are dropped, which doubles the peak of a conversion.
"""

import ctypes
import errno
import json
import math
import os
import struct
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import InputError
from megatron_rl.files import open_regular, parse_json
from megatron_rl.weights.pieces import Box, view, whole

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 << 20  # the safetensors library's own limit
STAGING_BYTES = 16 << 20
"""Size of the buffer of a read that needs one: its columns are cut, or its values are cast."""

# Errors by which some file systems say that they cannot reserve space.
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Entry:
    """The header's entry for one tensor."""

    dtype: str  # a key of DTYPES, or of a kind that we do not read
    shape: tuple[int, ...]
    start: int  # in bytes from the start of the file
    nbytes: int

    def of_axes(self, count: int) -> "Entry":
        """The same bytes with so many axes: where there are fewer, the first ones are one."""
        merged = len(self.shape) - count
        if merged <= 0:
            return self
        first = math.prod(self.shape[: merged + 1])
        return replace(self, shape=(first, *self.shape[merged + 1 :]))


class TensorFile:
    """An open safetensors file whose header fits its size."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its header.

        Raises:
            InputError: it is missing, truncated, longer than its header says, or no safetensors.
        """
        self.path = path
        try:
            opened = open_regular(path)
            weakref.finalize(self, opened.close)
            self._file = opened.fileno()
            self.entries = _read_header(path, self._file)
        except OSError as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({error.strerror}). Is it missing, or "
                "not downloaded yet?"
            ) from error

    def read(self, name: str, box: Box, into: Tensor) -> None:
        """Copy tensor[box] to `into`, which has the box's shape and any dtype and device.

        A box may have fewer axes than the tensor, whose first ones are one then.
        """
        entry = self.entries[name].of_axes(len(box))
        dtype = DTYPES[entry.dtype]
        is_whole_rows = box[1:] == whole(entry.shape[1:])
        if is_whole_rows and into.dtype == dtype and into.is_contiguous() and into.is_cpu:
            self._read_rows(entry, box[0], into)
            return
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        step = max(1, STAGING_BYTES // max(1, row_bytes))
        first, end = box[0]
        for lo in range(first, end, step):
            hi = min(lo + step, end)
            rows = torch.empty((hi - lo, *entry.shape[1:]), dtype=dtype)
            self._read_rows(entry, (lo, hi), rows)
            into[lo - first : hi - first].copy_(view(rows, ((0, hi - lo), *box[1:])))

    def _read_rows(self, entry: Entry, rows: tuple[int, int], into: Tensor) -> None:
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        buffer = byte_view(into)
        at = entry.start + rows[0] * row_bytes
        while len(buffer):
            count = os.preadv(self._file, [buffer], at)
            if count == 0:
                raise InputError(f"{self.path}: it became shorter while it was read")
            buffer, at = buffer[count:], at + count


class TensorFileWriter:
    """A safetensors file of known tensors, written a rectangle at a time in any order."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Write the header and reserve disk space, so that a full disk shows before any work."""
        header, self._entries = _plan(tensors)
        self._path = path
        self._missing = {name: math.prod(entry.shape) for name, entry in self._entries.items()}
        self._file = path.open("wb", buffering=0)
        _reserve(self._file.fileno(), len(header) + sum(e.nbytes for e in self._entries.values()))
        _write_all(self._file.fileno(), memoryview(header), 0)

    def write(self, name: str, box: Box, values: Tensor) -> None:
        """Write tensor[box] = values, cast to the tensor's dtype; never an element twice.

        A box may have fewer axes than the tensor, whose first ones are one then.
        """
        entry = self._entries[name].of_axes(len(box))
        values = values.to("cpu", DTYPES[entry.dtype]).contiguous()
        self._missing[name] -= values.numel()
        row_bytes = entry.nbytes // entry.shape[0]
        at = entry.start + box[0][0] * row_bytes
        if box[1:] == whole(entry.shape[1:]):
            _write_all(self._file.fileno(), byte_view(values), at)
            return
        (first, _), *rest = box[1:]
        assert not rest  # no rule cuts a tensor of three dimensions
        for number, row in enumerate(values):
            start = at + number * row_bytes + first * values.element_size()
            _write_all(self._file.fileno(), byte_view(row), start)

    def close(self) -> None:
        """Close the file.

        Raises:
            ValueError: an element was not written, which is a fault of the caller.
        """
        self._file.close()
        unwritten = [name for name, count in self._missing.items() if count]
        if unwritten:
            raise ValueError(f"{self._path}: not all of {unwritten[:4]} was written")


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place.

    An array of numpy would do, but its tensor could never leave its memory again.
    """
    assert tensor.is_contiguous()
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.of = tensor  # type: ignore[attr-defined]  # it lives as long as the view
    return memoryview(array)


def _read_header(path: Path, file: int) -> dict[str, Entry]:
    """The entries of the tensors that a file holds.

    Raises:
        InputError: the header does not describe exactly this file.
    """
    total = os.fstat(file).st_size
    length = os.pread(file, 8, 0)
    header_bytes = struct.unpack("<Q", length)[0] if len(length) == 8 else MAX_HEADER_BYTES
    start = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES or start > total:
        raise InputError(
            f"{path}: not a readable safetensors file: {total} bytes do not hold a header. Is it "
            "truncated, or a git-lfs pointer?"
        )
    try:
        header: Any = parse_json(os.pread(file, header_bytes, 8).decode())
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        entries = {name: _entry(fields, start) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file: {error!r}") from error
    _check_extent(path, entries, start, total)
    return entries


def _entry(fields: Mapping[str, Any], start: int) -> Entry:
    first, end = map(_count, fields["data_offsets"])
    return Entry(
        str(fields["dtype"]), tuple(map(_count, fields["shape"])), start + first, end - first
    )


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of elements or bytes")
    return value


def _check_extent(path: Path, entries: Mapping[str, Entry], start: int, total: int) -> None:
    """Check that tensors stand one after the other, without gaps, up to the end of the file."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        known = DTYPES.get(entry.dtype)
        wanted = entry.nbytes if known is None else math.prod(entry.shape) * known.itemsize
        if entry.start != at or entry.nbytes != wanted:
            raise InputError(
                f"{path}: not a readable safetensors file: {name} of shape {list(entry.shape)} "
                f"{entry.dtype} stands in {entry.nbytes} bytes from {entry.start}"
            )
        at += entry.nbytes
    if at != total:
        raise InputError(
            f"{path}: not a readable safetensors file: it has {total} bytes where its header asks "
            f"for {at}. Is it truncated, or not downloaded to its end?"
        )


def _plan(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file as bytes, and the entries of its tensors."""
    entries: dict[str, Entry] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        entries[name] = Entry(NAMES[dtype], shape, at, math.prod(shape) * dtype.itemsize)
        at += entries[name].nbytes
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, entry in entries.items():
        offsets = [entry.start, entry.start + entry.nbytes]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {name: replace(entry, start=start + entry.start) for name, entry in entries.items()}
    return struct.pack("<Q", len(text)) + text, placed


def _reserve(file: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in CANNOT_RESERVE:
            raise
        os.ftruncate(file, nbytes)


def _write_all(file: int, data: memoryview, at: int) -> None:
    while len(data):
        count = os.pwrite(file, data, at)
        data, at = data[count:], at + count
