"""From a Megatron-Core checkpoint of any layout to a Hugging Face directory, chunk by chunk."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.conversion.partial import PartialOutput, Progress, describe_files
from megatron_rl.megatron.stored_files import MegatronCheckpoint
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.dcp_files import METADATA, Chunk
from megatron_rl.weights.expert_stacks import Places, in_files
from megatron_rl.weights.hf_files import (
    HfCheckpoint,
    copy_companions,
    file_name,
    plan_files,
    write_index,
)
from megatron_rl.weights.layouts import float32_names, hf_shapes, stacks
from megatron_rl.weights.tensor_file import TensorFileWriter

FORMAT = 1  # of the journal; another number discards unfinished work
AHEAD_BYTES = 64 << 20
"""A record up to this size is read while the one before it is written."""


def convert_to_hf(
    checkpoint: MegatronCheckpoint,
    config_dir: Path,
    output: Path,
    arch: ModelArch,
    *,
    dtype: torch.dtype | None,
    file_bytes: int,
    progress: Progress,
) -> None:
    """Write the directory `output`.

    Args:
        checkpoint: the weights.
        config_dir: holds config.json, tokenizer and chat template, which are copied.
        output: the directory to make.
        arch: the architecture that config_dir describes.
        dtype: the dtype of weights in output; None: each keeps its own, as what is float32 in a
            model of any dtype does in either case.
        file_bytes: most bytes of tensors in one safetensors file.
        progress: is told the bytes of the weights as they are written.

    Raises:
        InputError: the checkpoint cannot be used, or the output cannot be written.
    """
    shapes = hf_shapes(arch)
    kept = float32_names(arch)
    of_parts = {
        name: checkpoint.dtypes[name] if dtype is None or name in kept else dtype for name in shapes
    }
    tensors = in_files(shapes, stacks(arch))
    places = Places(shapes, tensors.values())
    dtypes = {name: stack.dtype(of_parts, checkpoint.directory) for name, stack in tensors.items()}
    nbytes = {name: prod(stack.shape) * dtypes[name].itemsize for name, stack in tensors.items()}
    files = plan_files(nbytes, file_bytes)
    identity = {
        "format": FORMAT,
        "arch": repr(arch),
        "source": describe_files([checkpoint.directory / METADATA]),
        "files": files,
        "dtypes": {name: str(dtype) for name, dtype in dtypes.items()},
    }
    with PartialOutput(output, identity) as partial:
        partial.require_space(sum(nbytes.values()))
        progress.begin(sum(nbytes.values()))
        for number, names in enumerate(files):
            name = file_name(number, len(files))
            if name in partial.finished:
                progress.advance(sum(nbytes[tensor] for tensor in names))
                continue
            of_file = {tensor: (dtypes[tensor], tensors[tensor].shape) for tensor in names}
            _write_file(partial.directory / name, of_file, places, checkpoint, progress)
            partial.add(name, None)
        write_index(partial.directory, files, sum(nbytes.values()))
        copy_companions(config_dir, partial.directory, _main_dtype(dtypes, nbytes))
        # Index, headers and table must agree.
        HfCheckpoint(partial.directory, shapes, stacks=stacks(arch))
        partial.complete()


def _write_file(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    places: Places,
    checkpoint: MegatronCheckpoint,
    progress: Progress,
) -> None:
    """Write one safetensors file; each record that holds a part of it is read once."""
    writer = TensorFileWriter(path, tensors)
    found = [
        (mapped.chunk, pieces)
        for mapped in checkpoint.chunks
        if (pieces := [piece for piece in mapped.pieces if places.name(piece.hf) in tensors])
    ]
    records = _read_ahead(checkpoint, [chunk for chunk, _ in found])
    for (_, pieces), record in zip(found, records, strict=True):
        for piece in pieces:
            values = piece.of({piece.param: record})
            name = places.name(piece.hf)
            writer.write(name, places.box(piece.hf, piece.box), values)
            progress.advance(values.numel() * tensors[name][0].itemsize)
    writer.close()


def _read_ahead(checkpoint: MegatronCheckpoint, chunks: Sequence[Chunk]) -> Iterator[Tensor]:
    """The records in order; a small one is read while the caller writes the one before."""
    with ThreadPoolExecutor(1) as reader:
        coming: Future[Tensor] | None = None
        for number, chunk in enumerate(chunks, 1):
            record = coming.result() if coming else checkpoint.load(chunk)
            is_small = number < len(chunks) and chunks[number].length <= AHEAD_BYTES
            coming = reader.submit(checkpoint.load, chunks[number]) if is_small else None
            yield record


def _main_dtype(dtypes: Mapping[str, torch.dtype], nbytes: Mapping[str, int]) -> torch.dtype:
    """The dtype of most bytes of the weights."""
    counts: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        counts[dtype] += nbytes[name]
    return counts.most_common(1)[0][0]
