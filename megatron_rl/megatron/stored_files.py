"""Weights on disk as Hugging Face tensors: checkpoints of Megatron-Core, or safetensors."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.errors import InputError
from megatron_rl.megatron.stored_names import NAMINGS, Naming, StoredParams, stored_params
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.critic_files import critic_shapes
from megatron_rl.weights.dcp_files import (
    Chunk,
    StoredTensor,
    check_cover,
    read_chunk,
    read_stored_tensors,
)
from megatron_rl.weights.hf_files import HfCheckpoint, WeightFiles
from megatron_rl.weights.layouts import (
    MegatronParam,
    hf_shapes,
    is_behind,
    megatron_params,
    stacks,
)
from megatron_rl.weights.model_source import ModelSource
from megatron_rl.weights.pieces import Piece, Tensors, intersection

DESCRIPTION = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MAIN_WEIGHTS = re.compile(r"(?:.*\.)?optimizer\.state\.param\.(.+)")
# Keys of what a trainer keeps beside the model.
NOT_THE_MODEL = re.compile(r"optimizer\.|chained_\d+\.|rng_state|rerun_state|opt_param_scheduler")


def open_weights(source: ModelSource, arch: ModelArch) -> WeightFiles:
    """The weights of a language model, checked against it; no tensor is read yet.

    Raises:
        InputError: they are damaged, or of another model.
    """
    if source.megatron_dir is not None:
        return MegatronCheckpoint(source.megatron_dir, arch)
    return HfCheckpoint(source.config_dir, hf_shapes(arch), partial(is_behind, arch), stacks(arch))


def open_critic_weights(source: ModelSource, arch: ModelArch) -> WeightFiles:
    """The weights of an exported critic, or of a language model of either kind."""
    if source.megatron_dir is not None:
        return MegatronCheckpoint(source.megatron_dir, arch)
    shapes = critic_shapes(arch, source.config_dir)
    return HfCheckpoint(source.config_dir, shapes, partial(is_behind, arch), stacks(arch))


@dataclass(frozen=True)
class MappedChunk:
    """One chunk on disk, and the pieces of Hugging Face tensors that are in it."""

    chunk: Chunk
    pieces: tuple[Piece, ...]  # chunk[piece.stack][piece.index] = hf[piece.box]


class MegatronCheckpoint:
    """The weights of a distributed checkpoint, checked against what the model must have."""

    def __init__(self, directory: Path, arch: ModelArch, *, main_weights: bool = False) -> None:
        """Read the index of all tensors.

        Args:
            directory: it holds `.metadata`.
            main_weights: read the optimizer's float32 weights instead of the model's; what is not
                trained has none.

        Raises:
            InputError: damaged, hostile, or not a checkpoint of this model.
        """
        self.directory = directory
        self._stored = read_stored_tensors(directory)
        if main_weights:
            untrained = _untrained_keys(arch)
            own = {key: stored for key, stored in self._stored.items() if key in untrained}
            self._stored = own | _main_weights(directory, self._stored)
        params = stored_params(arch, lambda param: self._naming_of(param, arch))
        self._check_keys(params)
        self.chunks = tuple(
            MappedChunk(chunk, tuple(stored.pieces(chunk.box)))
            for key, stored in params.items()
            for chunk in self._stored[key].chunks
        )
        self.dtypes = {
            name: self._stored[key].dtype
            for key, stored in params.items()
            for name in stored.hf_names
        }
        self._holders: dict[str, list[tuple[Chunk, Piece]]] = defaultdict(list)
        for mapped in self.chunks:
            for piece in mapped.pieces:
                self._holders[piece.hf].append((mapped.chunk, piece))
        self._last: tuple[Chunk | None, Tensor] = (None, torch.empty(0))

    def load(self, chunk: Chunk) -> Tensor:
        """The tensor of one chunk."""
        return read_chunk(self.directory, chunk)

    @torch.no_grad()
    def fill(self, params: Tensors, pieces: Sequence[Piece]) -> None:
        """Copy hf[box] to params[index] for every piece; only chunks that hold some are read."""
        copies: dict[Chunk, list[tuple[Piece, Piece]]] = defaultdict(list)
        for piece in pieces:
            for chunk, held in self._holders[piece.hf]:
                box = intersection(held.box, piece.box)
                if box is not None:
                    copies[chunk].append((held.within(box), piece.within(box)))
        for chunk, pairs in copies.items():
            tensor = self._loaded(chunk)
            for source, target in pairs:
                target.of(params).copy_(source.of({source.param: tensor}))

    def _loaded(self, chunk: Chunk) -> Tensor:
        """The tensor of a chunk; the last one is kept, as its pieces are often read one by one."""
        if self._last[0] != chunk:
            self._last = (None, torch.empty(0))  # never two at a time
            self._last = (chunk, self.load(chunk))
        return self._last[1]

    def _naming_of(self, param: MegatronParam, arch: ModelArch) -> Naming:
        for naming in NAMINGS:
            if naming.key(param, arch) in self._stored:
                return naming
        raise InputError(
            f"{self.directory}: it has no {param.name}, of which {', '.join(param.hf_names)} is "
            "made. It is a checkpoint of another model than its config.json says, or incomplete"
        )

    def _check_keys(self, params: dict[str, StoredParams]) -> None:
        extra = [key for key in self._stored if key not in params and not NOT_THE_MODEL.match(key)]
        if extra:
            raise InputError(
                f"{self.directory}: {len(extra)} tensors are not known {sorted(extra)[:4]}: "
                "config.json means a model without them"
            )
        for key, stored in params.items():
            found, wanted = self._stored[key].shape, stored.shape
            if found != wanted and not (stored.first.is_vocabulary and _is_padded(found, wanted)):
                raise InputError(
                    f"{self.directory}: {key} has shape {list(found)}, but config.json means "
                    f"{list(wanted)}"
                )
            check_cover(self.directory, key, self._stored[key])


def describe(directory: Path, iteration: int) -> None:
    """Write the files that make tensors a checkpoint; last metadata.json, by which it is known.

    checkpoint_version 3.0 means the order of linear_qkv's matrix rows that Megatron-LM keeps.
    """
    torch.save({"iteration": iteration, "checkpoint_version": 3.0}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(DESCRIPTION))


def _untrained_keys(arch: ModelArch) -> set[str]:
    """Keys, in any naming, of what has no main weights: the optimizer does not know it."""
    untrained = [param for param in megatron_params(arch) if param.in_float32]
    return {naming.key(param, arch) for param in untrained for naming in NAMINGS}


def _is_padded(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(found) == len(wanted) and found[0] >= wanted[0] and found[1:] == wanted[1:]


def _main_weights(directory: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The optimizer's weights under the model's keys."""
    found = {
        match.group(1): tensor
        for key, tensor in stored.items()
        if (match := MAIN_WEIGHTS.fullmatch(key))
    }
    if not found:
        raise InputError(
            f"{directory}: it holds no main weights of an optimizer. Leave the option out"
        )
    return found
