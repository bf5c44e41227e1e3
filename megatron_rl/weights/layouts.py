"""The pieces of one rank, on the training side, in the engine, and in Hugging Face files."""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from megatron_rl.parallel.layout import Coordinates, EngineLayout, Layout
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.expert_stacks import Stack
from megatron_rl.weights.families.rows import EMBEDDING, FINAL_NORM, HEAD, TIED_HEAD_COPY
from megatron_rl.weights.families.tables import FAMILIES
from megatron_rl.weights.pieces import Piece, local_shapes, size, whole
from megatron_rl.weights.rules import Rule, Sections

# Ends of the names of parameters with rows of padding, which stand for no token.
VOCABULARY = (EMBEDDING.megatron, HEAD.megatron)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rule of the family's table at one layer and one expert of the model (None: it has none)."""

    rule: Rule
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, kw_only=True)
class MegatronParam:
    """One parameter of the whole model, as a single rank would hold it.

    The pieces tell the transform in both directions: param[piece.index] = hf[piece.box]. Together
    they cover all of the parameter and all of their Hugging Face tensors.
    """

    template: str  # name with {i} for the layer and {e} for the expert
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_vocabulary: bool  # rows of padding may follow; `shape` and `pieces` are without them
    in_float32: bool  # float32 in a model of any dtype, without a gradient
    stored: tuple[str, ...] = ()  # tensors of a checkpoint with a piece each, where not in one

    @property
    def name(self) -> str:
        """Its name in Megatron-Core's local layers, by numbers of the whole model."""
        return _numbered(self.template, self.layer, self.expert)

    @property
    def hf_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.hf for piece in self.pieces))


@functools.cache
def places(arch: ModelArch) -> tuple[Place, ...]:
    """The family's rules at every layer and expert of the model, in the order of the network."""
    return tuple(_places(arch))


def _places(arch: ModelArch) -> Iterator[Place]:
    family = FAMILIES[arch.model_type]
    yield Place(rule=EMBEDDING)
    for layer in range(arch.num_layers):
        has_experts = arch.has_experts(layer)
        others = family.router if has_experts else family.dense
        for rule in (*family.attention_of(arch, layer), *others):
            yield Place(rule=rule, layer=layer)
        for expert in range(arch.mixture.num_experts if arch.mixture and has_experts else 0):
            for rule in family.experts:
                yield Place(rule=rule, layer=layer, expert=expert)
    yield Place(rule=FINAL_NORM)
    if not arch.tied_embeddings:
        yield Place(rule=HEAD)


def megatron_params(arch: ModelArch) -> list[MegatronParam]:
    """Every parameter of the model with the Hugging Face tensors it is made of; needs no ranks.

    A tied head is not among them: it is the embedding.
    """
    params: list[MegatronParam] = []
    for place in places(arch):
        pieces = [
            _placed(piece, place, _numbered(piece.param, place.layer, place.expert))
            for piece in place.rule.megatron_pieces(arch, 1, 0)
        ]
        (shape,) = local_shapes(pieces).values()
        params.append(
            MegatronParam(
                template=place.rule.megatron,
                layer=place.layer,
                expert=place.expert,
                shape=shape,
                pieces=tuple(pieces),
                is_vocabulary=place.rule.megatron in VOCABULARY,
                in_float32=place.rule.in_float32,
                stored=place.rule.stored if isinstance(place.rule, Sections) else (),
            )
        )
    return params


def hf_shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's Hugging Face checkpoint, in the order of the network.

    Each matrix of an expert is one, whatever files hold several of them in a stack.
    """
    return {
        _numbered(name, place.layer, place.expert): shape
        for place in places(arch)
        for name, shape in place.rule.hf_shapes(arch).items()
    }


def stacks(arch: ModelArch) -> tuple[Stack, ...]:
    """The tensors of the model's files that hold several of hf_shapes' (expert_stacks.py)."""
    family = FAMILIES[arch.model_type]
    if arch.mixture is None or not family.expert_stacks:
        return ()
    shapes, count = hf_shapes(arch), arch.mixture.num_experts
    found = []
    for layer in filter(arch.has_experts, range(arch.num_layers)):
        for stack in family.expert_stacks:
            of_one = [shapes[_numbered(name, layer, 0)] for name in stack.of]
            parts = [_numbered(name, layer, e) for e in range(count) for name in stack.of]
            shape = (count, sum(rows for rows, *_ in of_one), *of_one[0][1:])
            found.append(Stack(_numbered(stack.hf, layer, None), shape, tuple(parts)))
    return tuple(found)


def float32_names(arch: ModelArch) -> frozenset[str]:
    """Hugging Face tensors that are float32 in a model of any dtype, and get no gradient."""
    return frozenset(
        _numbered(name, place.layer, place.expert)
        for place in places(arch)
        if place.rule.in_float32
        for name in place.rule.hf_shapes(arch)
    )


def is_behind(arch: ModelArch, name: str) -> bool:
    """Whether a tensor of a checkpoint is of a layer behind the last one, which is left out."""
    if arch.delta is not None:
        return arch.layers_behind > 0 and name.startswith("mtp.")
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and 0 <= int(layer[1]) - arch.num_layers < arch.layers_behind


def hf_pieces(shapes: dict[str, tuple[int, ...]]) -> list[Piece]:
    """One piece for each whole tensor under its own name: a checkpoint is one more layout."""
    return [Piece(name, whole(shape), name, whole(shape)) for name, shape in shapes.items()]


def megatron_pieces(arch: ModelArch, layout: Layout, at: Coordinates) -> list[Piece]:
    """The pieces of a training rank; with several model chunks, names begin with `chunk{v}.`."""
    shared = shared_pieces(arch, layout, tp_rank=at.tp_rank, pp_rank=at.pp_rank)
    return shared + expert_pieces(
        arch, layout, etp_rank=at.etp_rank, ep_rank=at.ep_rank, pp_rank=at.pp_rank
    )


def shared_pieces(arch: ModelArch, layout: Layout, *, tp_rank: int, pp_rank: int) -> list[Piece]:
    """The pieces of a training rank but those of experts."""
    pieces: list[Piece] = []
    for at, place in _held(arch, layout, pp_rank):
        if place.expert is None:
            for piece in place.rule.megatron_pieces(arch, layout.tp, tp_rank):
                name = _local_name(arch, layout, at, piece.param, place)
                pieces.append(_placed(piece, place, name))
    return pieces


def expert_pieces(
    arch: ModelArch, layout: Layout, *, etp_rank: int, ep_rank: int, pp_rank: int
) -> list[Piece]:
    """The pieces of the experts of one expert-parallel rank: an equal run of each layer's."""
    pieces: list[Piece] = []
    for at, place in _held(arch, layout, pp_rank):
        if place.expert is not None and place.expert // _experts_each(arch, layout) == ep_rank:
            for piece in place.rule.megatron_pieces(arch, layout.etp, etp_rank):
                name = _local_name(arch, layout, at, piece.param, place)
                pieces.append(_placed(piece, place, name))
    return pieces


def engine_pieces(arch: ModelArch, layout: EngineLayout, tp_rank: int) -> list[Piece]:
    """The pieces that a rank of a rollout engine holds, under vLLM's parameter names."""
    return [
        _placed(
            piece,
            place,
            _numbered(piece.param, place.layer, None),
            stack=() if place.expert is None else (place.expert,),
        )
        for place in places(arch)
        for piece in place.rule.engine_pieces(arch, layout.tp, tp_rank)
    ]


def check_filled(shapes: Mapping[str, tuple[int, ...]], pieces: Sequence[Piece]) -> None:
    """Check that pieces write all of these parameters but rows of padding, and nothing twice.

    Elements are counted, not places: a rule's pieces do not overlap.

    Raises:
        ValueError: naming a parameter of the model that is not as the table says.
    """
    written: dict[str, int] = Counter()
    for piece in pieces:
        written[piece.param] += size(piece.index)
    for name in shapes.keys() | written.keys():
        numel, given = prod(shapes.get(name, (0,))), written[name]
        is_padded = name.endswith(VOCABULARY) and given < numel
        if given != numel and not is_padded:
            raise ValueError(
                f"{name}: the model has {numel} elements of it, the table of its family {given}. "
                "Megatron-Core built another model than megatron_rl/weights/families describes"
            )


@dataclass(frozen=True, slots=True)
class _At:
    """Where something stands on its pipeline rank."""

    chunk: int
    layer: int | None = None  # counted from the first of the chunk


def _held(arch: ModelArch, layout: Layout, pp_rank: int) -> Iterator[tuple[_At, Place]]:
    """The place of everything that a pipeline rank holds, in the model and on the rank."""
    last = layout.vpp - 1, layout.pp - 1
    at_layer = [
        (divmod(stage, layout.pp), layer - layers.start)
        for stage, layers in enumerate(layout.layers_of(arch.num_layers))
        for layer in layers
    ]
    for place in places(arch):
        if place.layer is not None:
            (chunk, owner), layer = at_layer[place.layer]
        else:
            (chunk, owner), layer = (0, 0) if place.rule is EMBEDDING else last, None
        if owner == pp_rank:
            yield _At(chunk, layer), place
    if arch.tied_embeddings and pp_rank == last[1] and last != (0, 0):
        yield _At(last[0]), Place(rule=TIED_HEAD_COPY)


def _experts_each(arch: ModelArch, layout: Layout) -> int:
    assert arch.mixture is not None
    return arch.mixture.num_experts // layout.ep


def _local_name(arch: ModelArch, layout: Layout, at: _At, name: str, place: Place) -> str:
    """A parameter's name on its rank, where layers and experts count from the first it holds."""
    expert = place.expert
    if expert is not None:
        expert %= _experts_each(arch, layout)
    return (f"chunk{at.chunk}." if layout.vpp > 1 else "") + _numbered(name, at.layer, expert)


def _placed(piece: Piece, place: Place, param: str, stack: tuple[int, ...] = ()) -> Piece:
    """A rule's piece under the numbers of its place."""
    hf = _numbered(piece.hf, place.layer, place.expert)
    return replace(piece, param=param, hf=hf, stack=stack)


def _numbered(name: str, layer: int | None, expert: int | None) -> str:
    return name.replace("{i}", str(layer)).replace("{e}", str(expert))
