"""From a Hugging Face directory to a Megatron-Core checkpoint, a block of rows at a time.

No model is built and no process group is needed: the tables of weights/families say which rows of
which Hugging Face tensors make up a tensor of the checkpoint.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.conversion.partial import JOURNAL, PartialOutput, Progress, describe_files
from megatron_rl.errors import InputError
from megatron_rl.megatron.stored_files import MegatronCheckpoint, describe
from megatron_rl.megatron.stored_names import (
    StoredParams,
    extra_state_keys,
    stock_naming,
    stored_params,
)
from megatron_rl.weights.arch import ModelArch, padded_vocab_size
from megatron_rl.weights.dcp_files import (
    Chunk,
    StoredTensor,
    append_chunk,
    append_object,
    write_metadata,
)
from megatron_rl.weights.disk import sync
from megatron_rl.weights.hf_files import CONFIG, HfCheckpoint, copy_companions
from megatron_rl.weights.layouts import MegatronParam, hf_shapes, is_behind, stacks
from megatron_rl.weights.model_source import COMPANION_DIR, TRACKER
from megatron_rl.weights.pieces import Box, blocks, size

BLOCK_BYTES = 16 << 20
"""Most bytes of one chunk, and so of the weights that are in memory at a time."""

ITERATION = 1  # Megatron-LM refuses 0
FORMAT = 1  # of the journal; another number discards unfinished work
IDENTITY = "conversion.json"  # the file that says what the checkpoint was made of


@dataclass(frozen=True)
class _Plan:
    """The checkpoint that will be written: its tensors, and the chunks in each file."""

    tensors: Mapping[str, StoredParams]
    shapes: Mapping[str, tuple[int, ...]]  # they include rows that pad a vocabulary
    dtypes: Mapping[str, torch.dtype]
    files: Mapping[str, tuple[tuple[str, Box], ...]]  # file -> key and rectangle of its chunks

    @property
    def nbytes(self) -> int:
        return sum(self.chunk_bytes(key, box) for c in self.files.values() for key, box in c)

    def chunk_bytes(self, key: str, box: Box) -> int:
        return size(box) * self.dtypes[key].itemsize


def convert_to_megatron(
    source: Path,
    output: Path,
    arch: ModelArch,
    *,
    tp: int,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Path:
    """Write the checkpoint; returns its directory, output/iter_0000001.

    Args:
        source: a Hugging Face directory.
        output: gets the checkpoint and the file that names the newest one.
        arch: the architecture that source describes.
        tp: the tensor parallelism that it is meant for, which decides the padding of the
            vocabulary; any other layout loads it too.
        dtype: the dtype of weights; None: each keeps its own. What is float32 in a model of any
            dtype is so here, too.
        progress: is told the bytes of the weights as they are written.

    Raises:
        InputError: source cannot be used, or the output cannot be written.
    """
    checkpoint = HfCheckpoint(
        source, hf_shapes(arch), lambda name: is_behind(arch, name), stacks(arch)
    )
    plan = _plan(arch, checkpoint, tp, dtype)
    final = output / f"iter_{ITERATION:07d}"
    identity = {
        "format": FORMAT,
        "arch": repr(arch),
        "source": describe_files([*checkpoint.paths, source / CONFIG]),
        "shapes": {key: list(shape) for key, shape in plan.shapes.items()},
        "dtypes": {key: str(dtype) for key, dtype in plan.dtypes.items()},
        "block_bytes": BLOCK_BYTES,
    }
    if _is_unnamed(final, identity):
        (final / JOURNAL).unlink(missing_ok=True)
        _name_newest(output)
        return final
    if (output / TRACKER).exists():
        raise InputError(f"{output}: it holds Megatron-Core checkpoints. Choose another output")
    with PartialOutput(final, identity) as partial:
        partial.require_space(plan.nbytes)
        progress.begin(plan.nbytes)
        for name, planned in plan.files.items():
            if name in partial.finished:
                progress.advance(sum(plan.chunk_bytes(*chunk) for chunk in planned))
                continue
            chunks = _write_file(partial.directory / name, plan, name, checkpoint, progress)
            partial.add(name, [_to_json(chunk) for chunk in chunks])
        _write_descriptions(partial, plan, arch)
        (partial.directory / IDENTITY).write_text(json.dumps(identity, indent=2))
        copy_companions(source, partial.directory / COMPANION_DIR, dtype)
        MegatronCheckpoint(partial.directory, arch)  # it must find all that it needs
        partial.complete()
    _name_newest(output)
    return final


def _plan(arch: ModelArch, checkpoint: HfCheckpoint, tp: int, dtype: torch.dtype | None) -> _Plan:
    naming = stock_naming(arch)
    tensors = stored_params(arch, lambda _: naming)
    dtypes = {
        key: torch.float32
        if stored.first.in_float32
        else dtype or _common_dtype(stored, checkpoint, key)
        for key, stored in tensors.items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, list[tuple[str, Box]]] = defaultdict(list)
    for key, stored in tensors.items():
        for lead, param in stored.by_lead.items():
            shape = _padded(param, arch, tp)
            shapes[key] = (*stored.shape[: len(lead)], *shape)
            for box in blocks(shape, dtypes[key].itemsize, BLOCK_BYTES):
                files[_file_of(param, arch)].append((key, (*((n, n + 1) for n in lead), *box)))
    return _Plan(tensors, shapes, dtypes, {name: tuple(files[name]) for name in sorted(files)})


def _common_dtype(stored: StoredParams, checkpoint: HfCheckpoint, key: str) -> torch.dtype:
    """The one dtype of all Hugging Face tensors that a tensor of the checkpoint is made of."""
    names = stored.hf_names
    odd = [name for name in names if checkpoint.dtypes[name] != checkpoint.dtypes[names[0]]]
    if odd:
        raise InputError(
            f"{checkpoint.model_dir}: {names[0]} is {checkpoint.dtypes[names[0]]}, but {odd[0]} is "
            f"{checkpoint.dtypes[odd[0]]}: Megatron-Core keeps both in {key}. Choose one with "
            "--dtype"
        )
    return checkpoint.dtypes[names[0]]


def _padded(param: MegatronParam, arch: ModelArch, tp: int) -> tuple[int, ...]:
    if not param.is_vocabulary:
        return param.shape
    return (padded_vocab_size(arch.vocab_size, tp), *param.shape[1:])


def _file_of(param: MegatronParam, arch: ModelArch) -> str:
    """The file of a parameter. There is one per layer, soon written again if it is interrupted."""
    number = 0 if param.template.startswith("embedding.") else arch.num_layers + 1
    if param.layer is not None:
        number = param.layer + 1
    return f"__0_{number:04d}.distcp"


def _write_file(
    path: Path, plan: _Plan, name: str, checkpoint: HfCheckpoint, progress: Progress
) -> list[Chunk]:
    chunks: list[Chunk] = []
    with path.open("wb") as file:
        for key, box in plan.files[name]:
            tensor = torch.empty([hi - lo for lo, hi in box], dtype=plan.dtypes[key])
            pieces = list(plan.tensors[key].pieces(box))
            if sum(size(piece.box) for piece in pieces) < tensor.numel():
                tensor.zero_()  # rows that pad a vocabulary
            for piece in pieces:
                checkpoint.read(piece.hf, piece.box, piece.of({piece.param: tensor}))
            chunks.append(append_chunk(file, name, key, tuple(lo for lo, _ in box), tensor))
            progress.advance(tensor.nbytes)
    return chunks


def _write_descriptions(partial: PartialOutput, plan: _Plan, arch: ModelArch) -> None:
    """Write all but the weights; metadata.json is last, since Megatron-Core looks for it."""
    directory = partial.directory
    states = f"__0_{arch.num_layers + 2:04d}.distcp"
    with (directory / states).open("wb") as file:
        record = append_object(file, [None])
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    for name in plan.files:
        for fields in partial.finished[name]:
            chunk = _from_json(fields)
            chunks[chunk.key].append(chunk)
    write_metadata(
        directory,
        [StoredTensor(shape, tuple(chunks[key])) for key, shape in plan.shapes.items()],
        dict.fromkeys(extra_state_keys(arch, stock_naming(arch)), (states, *record)),
    )
    describe(directory, ITERATION)


def _is_unnamed(final: Path, identity: dict[str, Any]) -> bool:
    """True where this very conversion is complete but for the tracker file."""
    if (final.parent / TRACKER).exists() or not (final / IDENTITY).is_file():
        return False
    return bool(json.loads((final / IDENTITY).read_text()) == json.loads(json.dumps(identity)))


def _name_newest(output: Path) -> None:
    temporary = output / f".{TRACKER}"
    temporary.write_text(str(ITERATION))
    sync(temporary)
    temporary.rename(output / TRACKER)
    sync(output)


def _to_json(chunk: Chunk) -> dict[str, Any]:
    return asdict(chunk) | {"dtype": str(chunk.dtype).removeprefix("torch.")}


def _from_json(fields: dict[str, Any]) -> Chunk:
    return Chunk(
        **fields
        | {
            # Equal strings must be one object here, as in an uninterrupted conversion: a pickle
            # writes an object it has seen as a reference, so its bytes depend on that.
            "key": sys.intern(fields["key"]),
            "file": sys.intern(fields["file"]),
            "dtype": getattr(torch, fields["dtype"]),
            "offsets": tuple(fields["offsets"]),
            "sizes": tuple(fields["sizes"]),
        }
    )
