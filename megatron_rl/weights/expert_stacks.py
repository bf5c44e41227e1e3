"""How Hugging Face files hold the tensors of a model: most alone, those of experts in stacks.

Everywhere else a matrix of an expert is a tensor of its own, whose rectangles move (pieces.py). In
some families files hold the matrices of all experts of a layer in one tensor of three axes, over
each other: where its first two axes are one, each is a run of its rows.

Example: 4 experts with gate and up of 3 rows each. `experts.gate_up_proj` has the shape [4, 6, H],
and `experts.2.up_proj.weight` is its rows 15 to 17: behind two experts of 6 rows, and 3 of gate.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from megatron_rl.errors import InputError
from megatron_rl.weights.pieces import Box

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor of a file, and the tensors of the model that stand over each other in it."""

    name: str
    shape: Shape  # as the file says it
    parts: tuple[str, ...]

    def dtype(self, dtypes: Mapping[str, torch.dtype], where: object) -> torch.dtype:
        """The one dtype of its parts.

        Raises:
            InputError: they have several.
        """
        first = self.parts[0]
        odd = [part for part in self.parts if dtypes[part] != dtypes[first]]
        if odd:
            raise InputError(
                f"{where}: {first} is {dtypes[first]}, but {odd[0]} is {dtypes[odd[0]]}: files "
                f"hold both in {self.name}. Write all in one dtype first"
            )
        return dtypes[first]


def in_files(shapes: Mapping[str, Shape], stacks: Iterable[Stack]) -> dict[str, Stack]:
    """Every tensor of the files by name, in the order of the network; one alone is its own part."""
    stack_of = {part: stack for stack in stacks for part in stack.parts}
    found: dict[str, Stack] = {}
    for name, shape in shapes.items():
        stack = stack_of.get(name, Stack(name, shape, (name,)))
        found[stack.name] = stack
    return found


class Places:
    """Where the tensors of a model stand in those of its files."""

    def __init__(self, shapes: Mapping[str, Shape], stacks: Iterable[Stack]) -> None:
        self._at: dict[str, tuple[str, int]] = {}
        for stack in stacks:
            row = 0
            for part in stack.parts:
                self._at[part] = stack.name, row
                row += shapes[part][0]

    def name(self, tensor: str) -> str:
        return self._at[tensor][0]

    def box(self, tensor: str, box: Box) -> Box:
        """A rectangle of a tensor in that of the files, whose first axes are one."""
        row = self._at[tensor][1]
        (lo, hi), *rest = box
        return ((lo + row, hi + row), *rest)
