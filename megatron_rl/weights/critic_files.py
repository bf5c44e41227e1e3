"""A critic as files: a Hugging Face directory without an LM head, and the value head beside it."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.errors import InputError
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.layouts import hf_shapes
from megatron_rl.weights.pieces import Piece
from megatron_rl.weights.plan import Holders

VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_HEAD = "value_head.weight"


def critic_shapes(arch: ModelArch, model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Tensors of the directory's own files: an exported critic has no LM head."""
    shapes = hf_shapes(arch)
    return without_lm_head(shapes) if (model_dir / VALUE_HEAD_FILE).is_file() else shapes


def without_lm_head(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a language model that a critic has too."""
    return {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}


def critic_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """A language model's pieces, less those of the LM head, whose place the value head has."""
    return [piece for piece in pieces if not piece.param.endswith("output_layer.weight")]


def critic_holders(holders: Iterable[Holders]) -> list[Holders]:
    """The holders of a critic's pieces, made from those of its language model."""
    return [replace(holder, pieces=tuple(critic_pieces(holder.pieces))) for holder in holders]


def read_value_head(model_dir: Path, arch: ModelArch) -> Tensor | None:
    """The value head [1, H], or None where the directory holds a language model.

    Raises:
        InputError: the head has another shape.
    """
    path = model_dir / VALUE_HEAD_FILE
    if not path.is_file():
        return None
    head = load_file(path).get(VALUE_HEAD)
    if head is None or head.shape != (1, arch.hidden_size):
        found = "is missing" if head is None else f"has shape {list(head.shape)}"
        raise InputError(
            f"{path}: {VALUE_HEAD} {found}, the model needs [1, {arch.hidden_size}]. It is the "
            "value head of another model"
        )
    return head


def write_value_head(model_dir: Path, head: Tensor) -> None:
    """Write the value head [1, H] beside the tensors of a critic."""
    save_file(
        {VALUE_HEAD: head.detach().cpu().contiguous()},
        model_dir / VALUE_HEAD_FILE,
        metadata={"format": "pt"},
    )
