"""torch's distributed checkpoint format, read and written a chunk at a time; needs no ranks.

A chunk is a rectangle of a stored tensor, written as one record of torch.save. `.metadata` is a
pickle that says which bytes of which file hold which chunk of which tensor. torch's own reader
opens it with pickle.load, so that a checkpoint from elsewhere can run code; here only the record
types of the format are let in.
"""

import io
import os
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_rl.errors import InputError
from megatron_rl.files import open_regular
from megatron_rl.weights.pieces import Box

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangle of a stored tensor, and the record that holds it."""

    key: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int  # of the record's first byte in the file
    length: int  # of the record, in bytes

    @property
    def box(self) -> Box:
        return tuple((lo, lo + n) for lo, n in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, by its chunks."""

    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.chunks[0].dtype


def read_stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its key; no tensor data is read.

    Raises:
        InputError: `.metadata` is missing, damaged or hostile, or points at bytes that no file has.
    """
    metadata = read_metadata(directory)
    try:
        tensors = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        chunks = {
            key: _chunks(key, stored, metadata.storage_data) for key, stored in tensors.items()
        }
        shapes = {key: tuple(stored.size) for key, stored in tensors.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{directory / METADATA}: not as torch writes it: {error!r}") from error
    _check_files(directory, [chunk for found in chunks.values() for chunk in found])
    return {key: StoredTensor(shapes[key], chunks[key]) for key in tensors}


def _chunks(
    key: str, stored: TensorStorageMetadata, places: Mapping[MetadataIndex, _StorageInfo]
) -> tuple[Chunk, ...]:
    """The chunks of one tensor, without those that `.metadata` gives no bytes for."""
    indexed = [(chunk, places.get(MetadataIndex(key, chunk.offsets))) for chunk in stored.chunks]
    return tuple(
        Chunk(
            key=key,
            dtype=stored.properties.dtype,
            offsets=tuple(chunk.offsets),
            sizes=tuple(chunk.sizes),
            file=str(at.relative_path),
            position=int(at.offset),
            length=int(at.length),
        )
        for chunk, at in indexed
        if at is not None
    )


def check_cover(directory: Path, key: str, tensor: StoredTensor) -> None:
    """Check that the chunks of a tensor cover each of its elements once.

    Raises:
        InputError: they do not.
    """
    is_inside = all(
        0 <= lo <= hi <= n
        for chunk in tensor.chunks
        for (lo, hi), n in zip(chunk.box, tensor.shape, strict=True)
    )
    counts = _cell_counts(tensor) if is_inside else np.zeros(1)
    if not (counts == 1).all():
        raise InputError(
            f"{directory / METADATA}: the {len(tensor.chunks)} chunks of {key} do not cover its "
            f"shape {list(tensor.shape)} exactly"
        )


def read_metadata(directory: Path) -> Metadata:
    """The index of a checkpoint, read without running code.

    Raises:
        InputError: the index is missing, damaged, or holds anything but the format's own records.
    """
    path = directory / METADATA
    try:
        with io.BufferedReader(open_regular(path)) as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise InputError(
            f"{directory}: not a distributed checkpoint: no readable {METADATA} ({error.strerror})"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{path}: not a checkpoint's metadata: {error}") from error
    if not isinstance(metadata, Metadata):
        raise InputError(f"{path}: not a checkpoint's metadata: a {type(metadata).__name__}")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the records of the format and nothing else.

    Whole names are compared: of an allowed module a pickle may still ask for "os.system".
    """

    _TORCH = frozenset({"Size", *(n for n, v in vars(torch).items() if isinstance(v, torch.dtype))})
    _ALLOWED: Mapping[str, frozenset[str]] = {
        "torch": _TORCH,
        "torch.serialization": frozenset({"_get_layout"}),
        "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
        "torch.distributed.checkpoint.planner": frozenset(
            {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"}
        ),
        "torch.distributed.checkpoint.metadata": frozenset(
            {
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
            }
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which has no place there. Do not load this checkpoint "
            "with other programs: it may run code"
        )


def read_chunk(directory: Path, chunk: Chunk) -> Tensor:
    """The tensor of a chunk, on the CPU.

    Raises:
        InputError: the record is damaged, or is not what the metadata says.
    """
    with open_regular(directory / chunk.file) as file:
        record = _ByteRange(file, chunk.position, chunk.length)
        try:
            tensor = torch.load(cast(Any, record), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what it likes on a damaged record
            raise InputError(
                f"{directory / chunk.file}: the record of {chunk.key}{list(chunk.offsets)} is "
                f"damaged: {str(error).splitlines()[0]}"
            ) from error
    said = chunk.sizes, chunk.dtype
    if not isinstance(tensor, Tensor) or (tuple(tensor.shape), tensor.dtype) != said:
        raise InputError(
            f"{directory / chunk.file}: the record of {chunk.key}{list(chunk.offsets)} is not the "
            f"{list(chunk.sizes)} {chunk.dtype} that {METADATA} says"
        )
    return tensor.detach()


def append_chunk(
    file: BinaryIO, name: str, key: str, offsets: tuple[int, ...], tensor: Tensor
) -> Chunk:
    """Write a tensor as a record at the end of the open file `name`; returns its chunk."""
    position = file.tell()
    computes_checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # no reader of this format looks at them
    try:
        torch.save(tensor, file)
    finally:
        torch.serialization.set_crc32_options(computes_checksums)
    return Chunk(
        key=key,
        dtype=tensor.dtype,
        offsets=offsets,
        sizes=tuple(tensor.shape),
        file=name,
        position=position,
        length=file.tell() - position,
    )


def append_object(file: BinaryIO, content: object) -> tuple[int, int]:
    """Write a record of plain Python data; returns its (position, length) in the file."""
    position = file.tell()
    record = io.BytesIO()
    torch.save(content, record)
    file.write(record.getbuffer())
    return position, file.tell() - position


def write_metadata(
    directory: Path, tensors: Iterable[StoredTensor], objects: Mapping[str, tuple[str, int, int]]
) -> None:
    """Write the index of a checkpoint; objects: key -> (file, position, length)."""
    metadata = Metadata(
        state_dict_metadata={}, storage_data={}, storage_meta=StorageMeta(), version="1.0.0"
    )
    for tensor in tensors:
        metadata.state_dict_metadata[tensor.chunks[0].key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(tensor.shape),
            chunks=[
                ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
                for c in tensor.chunks
            ],
        )
        for chunk in tensor.chunks:
            index = MetadataIndex(chunk.key, chunk.offsets)
            metadata.storage_data[index] = _StorageInfo(chunk.file, chunk.position, chunk.length)
    for key, (file, position, length) in objects.items():
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file, position, length)
    with (directory / METADATA).open("wb") as out:
        pickle.dump(metadata, out)


class _ByteRange(io.RawIOBase):
    """A range of a file as a file of its own: torch.load reads it straight into the tensor.

    Through io.BytesIO(file.read(length)) every chunk would be in memory twice.
    """

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._file.fileno(), [wanted], self._start + self._at)
        self._at += count
        return count


def _check_files(directory: Path, chunks: Iterable[Chunk]) -> None:
    sizes: dict[str, int] = {}
    for chunk in chunks:
        path = directory / chunk.file
        if chunk.file not in sizes:
            if Path(chunk.file).name != chunk.file or not path.is_file():
                raise InputError(
                    f"{directory}: {METADATA} names the file {chunk.file!r}, which is not there"
                )
            sizes[chunk.file] = path.stat().st_size
        if not 0 <= chunk.position <= chunk.position + chunk.length <= sizes[chunk.file]:
            raise InputError(
                f"{path}: {chunk.key} should stand in {chunk.length} bytes from {chunk.position}, "
                f"but the file has {sizes[chunk.file]}. Is it truncated?"
            )


def _cell_counts(tensor: StoredTensor) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The number of chunks over each cell of the grid that the edges of all chunks draw."""
    edges = [
        sorted({0, n} | {edge for chunk in tensor.chunks for edge in chunk.box[dim]})
        for dim, n in enumerate(tensor.shape)
    ]
    place = [{edge: number for number, edge in enumerate(found)} for found in edges]
    counts = np.zeros([len(found) - 1 for found in edges], dtype=np.int32)
    for chunk in tensor.chunks:
        cells = tuple(
            slice(place[dim][lo], place[dim][hi]) for dim, (lo, hi) in enumerate(chunk.box)
        )
        counts[cells] += 1
    return counts if prod(tensor.shape) else np.ones(1, dtype=np.int32)
