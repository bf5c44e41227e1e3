"""Pieces: which rectangle of a local parameter holds which rectangle of a Hugging Face tensor.

The Hugging Face name space is the common coordinate system. A layout (Megatron's, the engine's, a
checkpoint's) is a list of pieces, computed from sizes alone, so that every rank knows what every
other rank holds without asking. Fusing, interleaving, padding and pipeline order exist only where
pieces are made (rules.py); whoever moves weights sees rectangles.

Example: Piece("linear_qkv.weight", ((4, 6), (0, 8)), "k_proj.weight", ((2, 4), (0, 8))) says that
rows 4 and 5 of this rank's linear_qkv are rows 2 and 3 of k_proj, in their full width of 8.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from torch import Tensor

Span = tuple[int, int]  # [start, end)
Box = tuple[Span, ...]


class Tensors(Protocol):
    """Tensors by name, perhaps made on demand; a dictionary is one."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle: param[index] holds hf[box]; index and box have the same shape.

    An engine stacks the matrices of all experts in one parameter: there param[stack][index] holds
    hf[box], and index has as many axes as one expert's matrix.
    """

    param: str
    index: Box
    hf: str
    box: Box
    stack: tuple[int, ...] = ()

    def of(self, params: Tensors) -> Tensor:
        """This rectangle of its parameter, sharing the parameter's storage."""
        return view(params[self.param][self.stack], self.index)

    def within(self, box: Box) -> "Piece":
        """The part of this piece that holds the given sub-box of its Hugging Face tensor."""
        index = tuple(
            (at[0] + lo - own[0], at[0] + hi - own[0])
            for at, own, (lo, hi) in zip(self.index, self.box, box, strict=True)
        )
        return replace(self, index=index, box=box)

    def cut(self, rows: Box) -> "Piece | None":
        """The part of this piece in a rectangle of its parameter; None where there is none.

        The part's index counts from the corner of that rectangle.
        """
        common = intersection(self.index, rows)
        if common is None:
            return None
        pairs = list(zip(common, self.index, self.box, rows, strict=True))
        return replace(
            self,
            index=tuple((lo - row[0], hi - row[0]) for (lo, hi), _, _, row in pairs),
            box=tuple((own[0] + lo - at[0], own[0] + hi - at[0]) for (lo, hi), at, own, _ in pairs),
        )


def view(tensor: Tensor, box: Box) -> Tensor:
    """The rectangle of a tensor, sharing its storage."""
    return tensor[tuple(slice(lo, hi) for lo, hi in box)]


def size(box: Box) -> int:
    return prod(hi - lo for lo, hi in box)


def intersection(a: Box, b: Box) -> Box | None:
    """The common rectangle, or None."""
    box = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return box if all(lo < hi for lo, hi in box) else None


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, n) for n in shape)


def blocks(shape: tuple[int, ...], itemsize: int, limit_bytes: int) -> Iterator[Box]:
    """A tensor's rectangles of whole rows, each of at most limit_bytes, or of one longer row."""
    row_bytes = max(1, prod(shape[1:]) * itemsize)
    step = max(1, limit_bytes // row_bytes)
    for lo in range(0, shape[0], step):
        yield ((lo, min(lo + step, shape[0])), *whole(shape[1:]))


def local_shapes(pieces: list[Piece]) -> dict[str, tuple[int, ...]]:
    """The smallest shape of each local parameter that holds its pieces."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        ends = (*(at + 1 for at in piece.stack), *(hi for _, hi in piece.index))
        known = shapes.get(piece.param, ends)
        shapes[piece.param] = tuple(max(a, b) for a, b in zip(known, ends, strict=True))
    return shapes
