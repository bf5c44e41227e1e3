"""Hugging Face checkpoints on disk: rectangles are read, new ones are laid out and described."""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.errors import InputError
from megatron_rl.files import read_json_object
from megatron_rl.weights.expert_stacks import Places, Stack, in_files
from megatron_rl.weights.pieces import Box, Piece, Tensors, blocks
from megatron_rl.weights.tensor_file import DTYPES, Entry, TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
# The files that a model directory needs beside its weights; copied byte for byte on export.
COMPANIONS = (
    CONFIG,
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
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED_BYTES = 64 << 20  # most bytes of a tensor that are compared with another at a time


class WeightFiles(Protocol):
    """The weights of a model on disk as Hugging Face tensors, whatever kind of checkpoint it is."""

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """The dtype of every tensor, as it is stored."""
        ...

    def fill(self, params: Tensors, pieces: Sequence[Piece]) -> None:
        """Copy hf[box] to params[index] for every piece; only these rectangles are read."""
        ...


class HfCheckpoint:
    """The tensors of a model directory, checked against what the model must have."""

    def __init__(
        self,
        model_dir: Path,
        shapes: Mapping[str, tuple[int, ...]],
        is_left_out: Callable[[str], bool] = lambda _: False,
        stacks: Iterable[Stack] = (),
    ) -> None:
        """Read the headers of all files.

        Args:
            model_dir: the directory.
            shapes: the tensors that it must have.
            is_left_out: whether a tensor of this name may be there that is not in shapes.
            stacks: tensors that may be there in the place of several of those.

        Raises:
            InputError: index, headers, file sizes and `shapes` do not agree.
        """
        self.model_dir = model_dir
        self._file_of = _open_files(model_dir)
        there = in_files(shapes, [stack for stack in stacks if stack.name in self._file_of])
        self._check_names(there.keys(), is_left_out)
        for name, stack in there.items():
            self._check_tensor(name, stack.shape)
        self._places = Places(shapes, there.values())
        self.dtypes = {name: DTYPES[self._entry(self._places.name(name)).dtype] for name in shapes}

    @property
    def paths(self) -> list[Path]:
        """The files that hold tensors."""
        return sorted({file.path for file in self._file_of.values()})

    def read(self, name: str, box: Box, into: Tensor) -> None:
        """Copy hf[box] to a tensor of the box's shape."""
        there = self._places.name(name)
        self._file_of[there].read(there, self._places.box(name, box), into)

    @torch.no_grad()
    def fill(self, params: Tensors, pieces: Sequence[Piece]) -> None:
        """Copy hf[box] to params[index] for every piece; only these rectangles are read."""
        for piece in pieces:
            self.read(piece.hf, piece.box, piece.of(params))

    def _entry(self, name: str) -> Entry:
        return self._file_of[name].entries[name]

    def _check_names(self, wanted: Collection[str], is_left_out: Callable[[str], bool]) -> None:
        is_tied_head = HEAD not in wanted and {HEAD, EMBEDDING} <= self._file_of.keys()
        if is_tied_head and not self._is_equal(HEAD, EMBEDDING):
            raise InputError(
                f"{self.model_dir}: config.json ties the embeddings but {HEAD} differs from "
                f"{EMBEDDING}. Set tie_word_embeddings=false or remove one of the tensors"
            )
        missing = sorted(set(wanted) - set(self._file_of))
        extra = sorted(
            name
            for name in set(self._file_of) - set(wanted)
            if not name.endswith("rotary_emb.inv_freq")
            and not (is_tied_head and name == HEAD)
            and not is_left_out(name)
        )
        if missing or extra:
            raise InputError(
                f"{self.model_dir}: the weights do not match config.json: "
                f"{len(missing)} tensors missing {missing[:4]}, {len(extra)} not known {extra[:4]}"
            )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        entry, path = self._entry(name), self._file_of[name].path
        if entry.shape != shape:
            raise InputError(
                f"{path}: {name} has shape {list(entry.shape)}, but config.json means {list(shape)}"
            )
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{path}: {name} has dtype {entry.dtype}: only {', '.join(DTYPES)} can be "
                "trained. Use an unquantised checkpoint"
            )

    def _is_equal(self, one: str, other: str) -> bool:
        shape, dtype = self._entry(one).shape, DTYPES.get(self._entry(one).dtype)
        if dtype is None or (shape, self._entry(one).dtype) != (
            self._entry(other).shape,
            self._entry(other).dtype,
        ):
            return False
        for box in blocks(shape, dtype.itemsize, COMPARED_BYTES):
            values = torch.empty(2, *(hi - lo for lo, hi in box), dtype=dtype)
            for name, into in zip((one, other), values, strict=True):
                self._file_of[name].read(name, box, into)
            if not torch.equal(values[0], values[1]):
                return False
        return True


def weight_names(model_dir: Path) -> list[str]:
    """The names of the files with a model's weights, which need not be there yet.

    Raises:
        InputError: the index of the directory cannot be read.
    """
    index = model_dir / INDEX
    return sorted(set(_indexed(index).values())) if index.exists() else [SINGLE]


def _open_files(model_dir: Path) -> dict[str, TensorFile]:
    """The file of each tensor; the index must say exactly what the files' headers say.

    transformers does not complain about an index that lacks a tensor, or names one in no file.
    """
    index = _read_index(model_dir)
    names = sorted(set(index.values())) if index is not None else [SINGLE]
    file_of: dict[str, TensorFile] = {}
    for name in names:
        file = TensorFile(model_dir / name)
        for tensor in file.entries:
            if tensor in file_of:
                raise InputError(f"{file.path}: {tensor} is also in {file_of[tensor].path.name}")
            file_of[tensor] = file
    if index is not None:
        _check_index(model_dir / INDEX, index, file_of)
    return file_of


def _read_index(model_dir: Path) -> dict[str, str] | None:
    index = model_dir / INDEX
    if index.exists():
        file_of = _indexed(index)
        if (model_dir / SINGLE).exists() and SINGLE not in file_of.values():
            raise InputError(
                f"{model_dir}: {INDEX} and {SINGLE} are both there, and the first names other "
                f"files. vLLM and this program would read those, transformers {SINGLE}. Remove "
                "what does not belong to the model"
            )
        return file_of
    if not (model_dir / SINGLE).exists():
        raise InputError(
            f"{model_dir}: neither {SINGLE} nor {INDEX} is there. Only safetensors weights are "
            "read: convert pickled ones with transformers' save_pretrained"
        )
    return None


def _indexed(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says it."""
    try:
        file_of: dict[str, str] = read_json_object(index)["weight_map"]  # type: ignore[assignment]
        outside = [name for name in file_of.values() if Path(name).name != name]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index: {error!r}") from error
    if outside:
        raise InputError(f"{index}: {outside[0]!r} is no file of its directory")
    return file_of


def _check_index(path: Path, index: Mapping[str, str], file_of: Mapping[str, TensorFile]) -> None:
    for name in sorted(index.keys() | file_of.keys()):
        said = index.get(name, "no file")
        found = file_of[name].path.name if name in file_of else "no file"
        if said != found:
            raise InputError(
                f"{path}: it says that {name} is in {said}, and the files' own headers that it is "
                f"in {found}. Fetch the directory again"
            )


def plan_files(nbytes: Mapping[str, int], limit_bytes: int) -> list[tuple[str, ...]]:
    """The names of the tensors of each output file, in order, up to limit_bytes a file."""
    files: list[list[str]] = [[]]
    used = 0
    for name, count in nbytes.items():
        if files[-1] and used + count > limit_bytes:
            files.append([])
            used = 0
        files[-1].append(name)
        used += count
    return [tuple(names) for names in files]


def file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(output: Path, files: Sequence[Sequence[str]], total_bytes: int) -> None:
    """Write the index, where there are several files; one file needs none."""
    if len(files) == 1:
        return
    weight_map = {
        name: file_name(number, len(files)) for number, names in enumerate(files) for name in names
    }
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (output / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, output: Path, dtype: torch.dtype | None = None) -> None:
    """Copy config and tokenizer, byte for byte but for the dtype that config.json may name.

    dtype: the dtype that the weights beside them are written in; None: config.json stays as it is.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if dtype is not None:
        _name_dtype(output / CONFIG, str(dtype).removeprefix("torch."))


def _name_dtype(config: Path, dtype: str) -> None:
    values = json.loads(config.read_text(encoding="utf-8"))
    wrong = {
        field: dtype
        for field in ("torch_dtype", "dtype")  # transformers 4, 5
        if values.get(field, dtype) != dtype
    }
    if wrong:
        config.write_text(json.dumps({**values, **wrong}, indent=2) + "\n", encoding="utf-8")
