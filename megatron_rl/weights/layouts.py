"""The pieces of one rank, on the training side, in the engine, and in Hugging Face files."""

from dataclasses import replace

from megatron_rl.parallel.layout import Coordinates, EngineLayout, Layout
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.decoder import EMBEDDING, FINAL_NORM, HEAD, TIED_HEAD_COPY
from megatron_rl.weights.families.registry import FAMILIES
from megatron_rl.weights.pieces import Piece, whole
from megatron_rl.weights.rules import Rule


def megatron_pieces(arch: ModelArch, layout: Layout, at: Coordinates) -> list[Piece]:
    """What a training rank holds; with several model chunks names begin with `chunk{v}.`."""
    pieces: list[Piece] = []
    layers_each = arch.num_layers // (layout.pp * layout.vpp)
    for chunk in range(layout.vpp):
        first = at.pp_rank == 0 and chunk == 0
        last = at.pp_rank == layout.pp - 1 and chunk == layout.vpp - 1
        first_layer = (chunk * layout.pp + at.pp_rank) * layers_each
        held: list[tuple[Rule, int | None]] = [(rule, None) for rule in _ends(arch, first, last)]
        held += [
            (rule, number)
            for number in range(layers_each)
            for rule in FAMILIES[arch.model_type].layer_rules
        ]
        prefix = f"chunk{chunk}." if layout.vpp > 1 else ""
        for rule, number in held:
            for piece in rule.megatron_pieces(arch, layout.tp, at.tp_rank):
                pieces.append(_numbered(piece, prefix, number, (number or 0) + first_layer))
    return pieces


def engine_pieces(arch: ModelArch, layout: EngineLayout, tp_rank: int) -> list[Piece]:
    """What a rollout engine rank holds, under vLLM's parameter names."""
    held: list[tuple[Rule, int | None]] = [(rule, None) for rule in (EMBEDDING, FINAL_NORM)]
    if not arch.tied_embeddings:
        held.append((HEAD, None))
    held += [
        (rule, number)
        for number in range(arch.num_layers)
        for rule in FAMILIES[arch.model_type].layer_rules
    ]
    return [
        _numbered(piece, "", number, number or 0)
        for rule, number in held
        for piece in rule.engine_pieces(arch, layout.tp, tp_rank)
    ]


def hf_shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's Hugging Face checkpoint, in the order of the network."""
    shapes = dict(EMBEDDING.hf_shapes(arch))
    for number in range(arch.num_layers):
        for rule in FAMILIES[arch.model_type].layer_rules:
            for name, shape in rule.hf_shapes(arch).items():
                shapes[name.replace("{i}", str(number))] = shape
    shapes |= FINAL_NORM.hf_shapes(arch)
    if not arch.tied_embeddings:
        shapes |= HEAD.hf_shapes(arch)
    return shapes


def hf_pieces(shapes: dict[str, tuple[int, ...]]) -> list[Piece]:
    """Whole tensors under their own names: a checkpoint is one more layout."""
    return [Piece(name, whole(shape), name, whole(shape)) for name, shape in shapes.items()]


def _ends(arch: ModelArch, first: bool, last: bool) -> list[Rule]:
    rules: list[Rule] = []
    if first:
        rules.append(EMBEDDING)
    if last:
        rules.append(FINAL_NORM)
        if not arch.tied_embeddings:
            rules.append(HEAD)
        elif not first:
            rules.append(TIED_HEAD_COPY)
    return rules


def _numbered(piece: Piece, prefix: str, local: int | None, layer: int) -> Piece:
    return replace(
        piece,
        param=prefix + piece.param.replace("{i}", str(local)),
        hf=piece.hf.replace("{i}", str(layer)),
    )
