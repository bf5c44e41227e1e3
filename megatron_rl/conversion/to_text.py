"""From a Hugging Face model that also reads images to one of its text, block by block."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_rl.conversion.partial import PartialOutput, Progress, describe_files
from megatron_rl.errors import InputError
from megatron_rl.files import read_json_object
from megatron_rl.weights.expert_stacks import Places, Stack, in_files
from megatron_rl.weights.families.hf_config import read_arch
from megatron_rl.weights.families.registry import OF_IMAGES
from megatron_rl.weights.families.tables import FAMILIES
from megatron_rl.weights.hf_files import (
    CONFIG,
    HfCheckpoint,
    copy_companions,
    file_name,
    plan_files,
    write_index,
)
from megatron_rl.weights.layouts import hf_shapes, stacks
from megatron_rl.weights.pieces import blocks
from megatron_rl.weights.tensor_file import TensorFileWriter

FORMAT = 1  # of the journal; another number discards unfinished work
BLOCK_BYTES = 16 << 20
"""Most bytes of weights that are in memory at a time."""

LEFT_OUT = ("model.visual.", "mtp.")  # what sees images, and what guesses tokens ahead


def convert_to_text(source: Path, output: Path, *, file_bytes: int, progress: Progress) -> None:
    """Write the directory `output`, whose tensors are bit for bit those of the source's text.

    Args:
        source: a Hugging Face directory.
        output: the directory to make.
        file_bytes: most bytes of tensors in one safetensors file.
        progress: is told the bytes of the weights as they are written.

    Raises:
        InputError: the source has no text of its own, or cannot be used; or the output cannot be
            written.
    """
    config = text_config(read_json_object(source / CONFIG), str(source / CONFIG))
    family = FAMILIES[str(config["model_type"])]
    arch = read_arch(family, config, str(source / CONFIG))
    shapes, stacked = hf_shapes(arch), stacks(arch)
    there = {name: _name_there(name) for name in shapes}
    checkpoint = HfCheckpoint(
        source,
        {there[name]: shape for name, shape in shapes.items()},
        lambda name: name.startswith(LEFT_OUT),
        map(_stack_there, stacked),
    )
    of_parts = {name: checkpoint.dtypes[there[name]] for name in shapes}
    held = in_files(shapes, stacked)
    places = Places(shapes, held.values())
    dtypes = {name: stack.dtype(of_parts, source) for name, stack in held.items()}
    nbytes = {name: prod(stack.shape) * dtypes[name].itemsize for name, stack in held.items()}
    files = plan_files(nbytes, file_bytes)
    identity = {
        "format": FORMAT,
        "source": describe_files([*checkpoint.paths, source / CONFIG]),
        "files": files,
    }
    with PartialOutput(output, identity) as partial:
        partial.require_space(sum(nbytes.values()))
        progress.begin(sum(nbytes.values()))
        for number, names in enumerate(files):
            file = file_name(number, len(files))
            if file in partial.finished:
                progress.advance(sum(nbytes[name] for name in names))
                continue
            tensors = {name: (dtypes[name], held[name].shape) for name in names}
            writer = TensorFileWriter(partial.directory / file, tensors)
            for part in chain.from_iterable(held[name].parts for name in names):
                for box in blocks(shapes[part], of_parts[part].itemsize, BLOCK_BYTES):
                    values = torch.empty([hi - lo for lo, hi in box], dtype=of_parts[part])
                    checkpoint.read(there[part], box, values)
                    writer.write(places.name(part), places.box(part, box), values)
                    progress.advance(values.nbytes)
            writer.close()
            partial.add(file, None)
        write_index(partial.directory, files, sum(nbytes.values()))
        copy_companions(source, partial.directory)
        (partial.directory / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
        # Index, headers and table must agree.
        HfCheckpoint(partial.directory, shapes, stacks=stacked)
        partial.complete()


def text_config(config: Mapping[str, object], where: str) -> dict[str, Any]:
    """The config.json of the text alone.

    Raises:
        InputError: it is not of a model that reads images, or says two things of the head.
    """
    own, text = config.get("model_type"), config.get("text_config")
    if own not in OF_IMAGES or not isinstance(text, Mapping):
        raise InputError(
            f"{where}: model_type={own!r} is not one of {', '.join(OF_IMAGES)} with a text_config: "
            "it has no text of its own to take out. Use it as it is"
        )
    model_type = OF_IMAGES[str(own)]
    if text.get("model_type", model_type) != model_type:
        raise InputError(
            f"{where}: text_config.model_type={text['model_type']!r} must be {model_type!r}"
        )
    name = "tie_word_embeddings"
    told = [part[name] for part in (config, text) if name in part]
    if len(set(map(repr, told))) > 1:
        raise InputError(
            f"{where}: {name} is {told[0]!r}, and {told[1]!r} in text_config. Remove the wrong one"
        )
    taken = {field: config[field] for field in ("dtype", "torch_dtype") if field in config}
    return {
        **taken,
        **text,
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].architecture],
        **({name: told[0]} if told else {}),
    }


def _name_there(name: str) -> str:
    """The name of a tensor of the text in a model that also reads images."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _stack_there(stack: Stack) -> Stack:
    parts = tuple(map(_name_there, stack.parts))
    return replace(stack, name=_name_there(stack.name), parts=parts)
