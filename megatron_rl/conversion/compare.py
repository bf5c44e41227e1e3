"""Comparison of two checkpoints of either kind, tensor by tensor, a block of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from megatron_rl.conversion.partial import Progress
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.checksum import INTEGER_OF
from megatron_rl.weights.hf_files import WeightFiles
from megatron_rl.weights.layouts import hf_shapes
from megatron_rl.weights.pieces import Box, Piece, blocks, size

BLOCK_BYTES = 64 << 20


@dataclass(kw_only=True)
class Comparison:
    """The differences that were found."""

    num_tensors: int
    differing: list[str] = field(default_factory=list)
    """The names of tensors that differ, in the order of the network."""

    first: str = ""
    """The first difference in words: tensor, place, both values."""

    largest: float = 0.0
    """The largest absolute difference of two elements; nan where only one of them is a number."""


def differences_of_arch(one: ModelArch, other: ModelArch) -> Iterator[str]:
    """A line for each number of the architecture that the two models do not share."""
    for each in fields(ModelArch):
        values = getattr(one, each.name), getattr(other, each.name)
        if values[0] != values[1]:
            yield f"{each.name} is {values[0]} and {values[1]}"


def compare_weights(
    one: WeightFiles,
    other: WeightFiles,
    arch: ModelArch,
    *,
    tolerance: float | None,
    progress: Progress,
) -> Comparison:
    """Compare every tensor.

    Args:
        one: the weights of a model.
        other: the weights of another model of the same architecture.
        arch: that architecture.
        tolerance: largest absolute difference that counts as equal, whatever the dtypes; None:
            dtypes and bits must be equal.
        progress: is told the bytes of `one` as they are compared.
    """
    shapes = hf_shapes(arch)
    progress.begin(sum(_nbytes(box, one.dtypes[name]) for name, box in _boxes(shapes, one)))
    found = Comparison(num_tensors=len(shapes))
    for name, box in _boxes(shapes, one):
        dtypes = one.dtypes[name], other.dtypes[name]
        if tolerance is None and dtypes[0] != dtypes[1]:
            _note(found, name, f"{name} is {dtypes[0]} and {dtypes[1]}")
        values = [_read(files, name, box) for files in (one, other)]
        _compare(found, name, box, values, tolerance)
        progress.advance(_nbytes(box, dtypes[0]))
    return found


def _boxes(shapes: dict[str, tuple[int, ...]], files: WeightFiles) -> Iterator[tuple[str, Box]]:
    for name, shape in shapes.items():
        for box in blocks(shape, files.dtypes[name].itemsize, BLOCK_BYTES):
            yield name, box


def _nbytes(box: Box, dtype: torch.dtype) -> int:
    return size(box) * dtype.itemsize


def _read(files: WeightFiles, name: str, box: Box) -> Tensor:
    tensor = torch.empty([hi - lo for lo, hi in box], dtype=files.dtypes[name])
    files.fill({name: tensor}, [Piece(name, tuple((0, hi - lo) for lo, hi in box), name, box)])
    return tensor


def _compare(
    found: Comparison, name: str, box: Box, values: list[Tensor], tolerance: float | None
) -> None:
    one, other = values
    is_same_dtype = one.dtype == other.dtype
    if is_same_dtype and torch.equal(_bits(one), _bits(other)):
        return
    gap = (one.double() - other.double()).abs()
    if tolerance is None and is_same_dtype:
        differs = _bits(one) != _bits(other)
    else:
        differs = ~(gap <= (tolerance or 0.0))  # nan differs from everything
    if not differs.any():
        return
    place = tuple(differs.nonzero()[0].tolist())
    where = [lo + at for (lo, _), at in zip(box, place, strict=True)]
    _note(found, name, f"{name}{where} is {one[place].item():.9g} and {other[place].item():.9g}")
    found.largest = float(torch.tensor([found.largest, gap[differs].max().item()]).max())


def _note(found: Comparison, name: str, what: str) -> None:
    found.first = found.first or what
    if name not in found.differing:
        found.differing.append(name)


def _bits(tensor: Tensor) -> Tensor:
    """The elements' bits as integers, by which 0.0 differs from -0.0 and a nan equals itself."""
    return tensor.view(INTEGER_OF[tensor.element_size()])
