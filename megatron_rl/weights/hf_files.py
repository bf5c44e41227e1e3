"""Hugging Face checkpoints on disk: read rectangles of them, write whole ones."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rl.errors import InputError
from megatron_rl.weights.pieces import Piece

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What makes a model directory usable beside its weights; copied byte for byte on export.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class HfCheckpoint:
    """The tensors of a model directory, checked against what the model must have."""

    def __init__(self, model_dir: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model_dir = model_dir
        self.file_of = _tensor_files(model_dir)
        self._check_names(shapes)
        self._check_headers(shapes)

    def fill(self, params: Mapping[str, Tensor], pieces: Sequence[Piece]) -> None:
        """Copy hf[box] to params[index] for every piece; only these rectangles are read."""
        by_file: dict[str, list[Piece]] = {}
        for piece in pieces:
            by_file.setdefault(self.file_of[piece.hf], []).append(piece)
        for name, wanted in by_file.items():
            with self._opened(name) as tensors, torch.no_grad():
                for piece in wanted:
                    rectangle = tensors.get_slice(piece.hf)[
                        tuple(slice(lo, hi) for lo, hi in piece.box)
                    ]
                    piece.of(params).copy_(rectangle)

    def _check_names(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        tied_head = "lm_head.weight" not in shapes and "lm_head.weight" in self.file_of
        if tied_head and "model.embed_tokens.weight" in self.file_of:
            with (
                self._opened(self.file_of["lm_head.weight"]) as head,
                self._opened(self.file_of["model.embed_tokens.weight"]) as embedding,
            ):
                is_same = torch.equal(
                    head.get_tensor("lm_head.weight"),
                    embedding.get_tensor("model.embed_tokens.weight"),
                )
            if not is_same:
                raise InputError(
                    f"{self.model_dir}: config.json ties the embeddings but lm_head.weight "
                    "differs from model.embed_tokens.weight. Set tie_word_embeddings=false "
                    "or remove one of the tensors"
                )
        missing = sorted(set(shapes) - set(self.file_of))
        extra = sorted(
            name
            for name in set(self.file_of) - set(shapes)
            if not name.endswith("rotary_emb.inv_freq") and not (tied_head and "lm_head" in name)
        )
        if missing or extra:
            raise InputError(
                f"{self.model_dir}: the weights do not match config.json: "
                f"{len(missing)} tensors missing {missing[:4]}, {len(extra)} not known {extra[:4]}"
            )

    def _check_headers(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name in sorted(set(self.file_of.values())):
            with self._opened(name) as tensors:
                present = set(tensors.keys())
                for tensor, file in self.file_of.items():
                    if file != name or tensor not in shapes:
                        continue
                    if tensor not in present:
                        raise InputError(f"{self.model_dir / name}: it has no tensor {tensor}")
                    header = tensors.get_slice(tensor)
                    shape, dtype = tuple(header.get_shape()), header.get_dtype()
                    if shape != shapes[tensor]:
                        raise InputError(
                            f"{self.model_dir / name}: {tensor} has shape {list(shape)}, but "
                            f"config.json means {list(shapes[tensor])}"
                        )
                    if dtype not in DTYPES:
                        raise InputError(
                            f"{self.model_dir / name}: {tensor} has dtype {dtype}: only "
                            f"{', '.join(DTYPES)} can be trained. Use an unquantised checkpoint"
                        )

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self.model_dir / name
        try:
            with safe_open(path, "pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: not a readable safetensors file ({error}). Is it truncated, missing or a "
                "git-lfs pointer?"
            ) from error


def _tensor_files(model_dir: Path) -> dict[str, str]:
    index = model_dir / INDEX
    if index.is_file():
        try:
            file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise InputError(f"{index}: not a safetensors index: {error!r}") from error
        return file_of
    if not (model_dir / SINGLE).is_file():
        raise InputError(
            f"{model_dir}: neither {SINGLE} nor {INDEX} is there. Only safetensors weights are "
            "read: convert pickled ones with transformers' save_pretrained"
        )
    try:
        with safe_open(model_dir / SINGLE, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)
    except SafetensorError as error:
        raise InputError(
            f"{model_dir / SINGLE}: not a readable safetensors file: {error}"
        ) from error


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit_bytes: int
) -> list[tuple[str, ...]]:
    """Tensors of each output file, in order, up to limit_bytes a file."""
    files: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * itemsize
        if files[-1] and used + nbytes > limit_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += nbytes
    return [tuple(names) for names in files]


def file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, complete or not there."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        temporary,
        metadata={"format": "pt"},
    )
    os.replace(temporary, path)


def write_companions(
    source: Path, output: Path, files: Sequence[Sequence[str]], dtype: torch.dtype
) -> None:
    """The index where there are several files, and copies of config and tokenizer.

    The copies are byte for byte, but for the dtype that config.json names: it says what is written.
    """
    if len(files) > 1:
        weight_map = {
            name: file_name(number, len(files))
            for number, names in enumerate(files)
            for name in names
        }
        (output / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n"
        )
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if (output / "config.json").is_file():
        _name_dtype(output / "config.json", str(dtype).removeprefix("torch."))


def _name_dtype(config: Path, dtype: str) -> None:
    values = json.loads(config.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in values else "dtype"  # transformers 4, 5
    if values.get(field) != dtype:
        config.write_text(json.dumps({**values, field: dtype}, indent=2) + "\n", encoding="utf-8")
