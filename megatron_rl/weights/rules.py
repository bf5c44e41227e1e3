"""Rules: how one Megatron parameter, one engine parameter and Hugging Face tensors correspond.

A rule answers three questions, and is the only place that knows the answer: which Hugging Face
tensors there are and their shapes, which rectangles of them a Megatron rank holds, and which an
engine rank holds. In names `{i}` is the layer and `{e}` the expert (both global in Hugging Face
and engine names; local to the pipeline chunk and the expert-parallel rank in Megatron's). Both
directions follow from the rectangles: loading copies hf[box] to param[index], exporting copies it
back. `Qkv` has an example with numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, Protocol

from megatron_rl.weights.arch import ModelArch, padded_vocab_size
from megatron_rl.weights.pieces import Piece, Span, whole

Size = Callable[[ModelArch], int]
Shape = Callable[[ModelArch], tuple[int, ...]]


class Rule(Protocol):
    """One row of a family's table."""

    @property
    def megatron(self) -> str:
        """Name of the parameter in a model of Megatron-Core's local layers."""
        ...

    @property
    def in_float32(self) -> bool:
        """True where it is float32 in a model of any dtype, and no gradient reaches it."""
        ...

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]: ...

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]: ...

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]: ...


def _share(length: int, parts: int, part: int) -> Span:
    """The rows of one of `parts` equal runs."""
    each = length // parts
    return (part * each, (part + 1) * each)


def _rows(param: str, at: int, hf: str, rows: Span, shape: tuple[int, ...]) -> Piece:
    """The piece that says: param, from row `at` on, holds these rows of hf in full width."""
    rest = whole(shape[1:])
    return Piece(param, ((at, at + rows[1] - rows[0]), *rest), hf, (rows, *rest))


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A tensor that is the same everywhere: replicated (axis None), or cut evenly along axis."""

    megatron: str
    hf: str
    engine: str
    shape: Shape
    axis: int | None = None
    in_float32: bool = False

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        return {self.hf: self.shape(arch)}

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._pieces(self.megatron, arch, tp, tp_rank)

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._pieces(self.engine, arch, tp, tp_rank)

    def _pieces(self, param: str, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        box = list(whole(self.shape(arch)))
        index = list(box)
        if self.axis is not None:
            box[self.axis] = _share(box[self.axis][1], tp, tp_rank)
            index[self.axis] = (0, box[self.axis][1] - box[self.axis][0])
        yield Piece(param, tuple(index), self.hf, tuple(box))


@dataclass(frozen=True, kw_only=True)
class Down:
    """Rows that make a latent vector: cut evenly in Megatron, whole on every rank of an engine.

    There they may stand behind others: those of queries come first.
    """

    megatron: str
    hf: str
    engine: str
    rows: Size
    engine_at: Size = lambda _: 0  # the first of the engine's rows
    in_float32: ClassVar[bool] = False

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        return {self.hf: (self.rows(arch), arch.hidden_size)}

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        rows = self.rows(arch)
        shape = (rows, arch.hidden_size)
        yield _rows(self.megatron, 0, self.hf, _share(rows, tp, tp_rank), shape)

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        rows = self.rows(arch)
        at = self.engine_at(arch)
        yield _rows(self.engine, at, self.hf, (0, rows), (rows, arch.hidden_size))


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """The rows of the vocabulary, cut evenly with padding.

    Rows of padding stand for no Hugging Face rows and are never moved.
    """

    megatron: str
    hf: str
    engine: str
    in_float32: ClassVar[bool] = False

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        return {self.hf: (arch.vocab_size, arch.hidden_size)}

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._pieces(
            self.megatron, arch, padded_vocab_size(arch.vocab_size, tp), tp, tp_rank
        )

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        padded = padded_vocab_size(arch.vocab_size, 1)  # vLLM pads alike at every tp
        return self._pieces(self.engine, arch, padded, tp, tp_rank)

    def _pieces(
        self, param: str, arch: ModelArch, padded: int, tp: int, tp_rank: int
    ) -> Iterator[Piece]:
        lo, hi = _share(padded, tp, tp_rank)
        hi = min(hi, arch.vocab_size)
        if lo < hi:
            yield _rows(param, 0, self.hf, (lo, hi), (arch.vocab_size, arch.hidden_size))


@dataclass(frozen=True, kw_only=True)
class Qkv:
    """Query, key and value projections, fused.

    Megatron's rows are, group by group: its queries, then one key, then one value; a rank holds an
    equal run of them, cut wherever it falls. The engine's are all queries of the rank, its keys,
    its values; with fewer key heads than ranks each key head stands on several ranks.

    Example: 4 query heads in 2 groups, head_dim 2. Megatron's 16 rows are q0 q1 k0 v0 q2 q3 k1 v1,
    each of two rows. At TP 2 rank 1 holds the second half on both sides, so nothing has to move:

        its rows 0 to 3 are q_proj[4:8], rows 4 and 5 k_proj[2:4], rows 6 and 7 v_proj[2:4]

    At TP 4 Megatron's rank 1 holds k0 and v0 and no query. The engine's rank 1 holds q1, k0 and v0,
    so it lacks q_proj[2:4], which Megatron's rank 0 has.
    """

    megatron: str
    hf: str  # {proj} stands for q, k and v
    engine: str
    is_bias: bool = False
    in_float32: ClassVar[bool] = False

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        return {
            self._hf(proj): self._shape(arch, rows)
            for proj, rows in (("q", arch.query_rows), ("k", arch.key_rows), ("v", arch.key_rows))
        }

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        groups, dim = arch.num_query_groups, arch.head_dim
        query_rows = arch.query_rows // groups
        group_rows = query_rows + 2 * dim
        lo, hi = _share(groups * group_rows, tp, tp_rank)
        for group in range(lo // group_rows, -(-hi // group_rows)):
            at = group * group_rows
            for proj, rows in (("q", query_rows), ("k", dim), ("v", dim)):
                start, end = max(at, lo), min(at + rows, hi)
                if start < end:
                    first = group * rows + start - at
                    yield _rows(
                        self.megatron,
                        start - lo,
                        self._hf(proj),
                        (first, first + end - start),
                        self._shape(arch, 0),
                    )
                at += rows

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        query = _share(arch.query_rows, tp, tp_rank)
        heads = max(1, arch.num_query_groups // tp)
        first_head = tp_rank * arch.num_query_groups // tp
        key = (first_head * arch.head_dim, (first_head + heads) * arch.head_dim)
        at = 0
        for proj, rows in (("q", query), ("k", key), ("v", key)):
            yield _rows(self.engine, at, self._hf(proj), rows, self._shape(arch, 0))
            at += rows[1] - rows[0]

    def _hf(self, proj: str) -> str:
        return self.hf.replace("{proj}", proj)

    def _shape(self, arch: ModelArch, rows: int) -> tuple[int, ...]:
        return (rows,) if self.is_bias else (rows, arch.hidden_size)


@dataclass(frozen=True, kw_only=True)
class GatedQkv:
    """Query, gate, key and value projections, fused.

    Megatron's rows are, group by group: its queries, the gates of their outputs, one key, one
    value; a rank holds an equal run of them. Hugging Face has each head's gate behind its queries
    in q_proj, and so has the engine, which has keys and values behind all of them.
    """

    megatron: str
    hf: str  # {proj} stands for q, k and v
    engine: str
    in_float32: ClassVar[bool] = False

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        rows = {"q": 2 * arch.query_rows, "k": arch.key_rows, "v": arch.key_rows}
        return {self._hf(proj): (count, arch.hidden_size) for proj, count in rows.items()}

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        lo, hi = _share(arch.qkv_rows, tp, tp_rank)
        at = 0
        for proj, first in self._heads(arch):
            start, end = max(at, lo), min(at + arch.head_dim, hi)
            if start < end:
                rows = (first + start - at, first + end - at)
                yield _rows(self.megatron, start - lo, self._hf(proj), rows, (0, arch.hidden_size))
            at += arch.head_dim

    def _heads(self, arch: ModelArch) -> Iterator[tuple[str, int]]:
        """The heads in Megatron's order, each as a projection and its first row there."""
        dim, each = arch.head_dim, arch.num_attention_heads // arch.num_query_groups
        for group in range(arch.num_query_groups):
            heads = range(group * each, (group + 1) * each)
            yield from (("q", 2 * head * dim) for head in heads)
            yield from (("q", (2 * head + 1) * dim) for head in heads)
            yield from (("k", group * dim), ("v", group * dim))

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        query = _share(2 * arch.query_rows, tp, tp_rank)
        heads = max(1, arch.num_query_groups // tp)
        first_head = tp_rank * arch.num_query_groups // tp
        key = (first_head * arch.head_dim, (first_head + heads) * arch.head_dim)
        at = 0
        for proj, rows in (("q", query), ("k", key), ("v", key)):
            yield _rows(self.engine, at, self._hf(proj), rows, (0, arch.hidden_size))
            at += rows[1] - rows[0]

    def _hf(self, proj: str) -> str:
        return self.hf.replace("{proj}", proj)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Some of the rows of a parameter, which ranks cut by themselves."""

    name: str  # of the tensor in Megatron's checkpoints, behind the parameter's
    hf: str
    engine: str
    rows: Size
    hf_at: Size = lambda _: 0  # the first of its rows in the Hugging Face tensor


@dataclass(frozen=True, kw_only=True)
class Sections:
    """Sections, one over the other: a rank holds its share of each.

    In Hugging Face files and in the engine several may be one tensor, in the same order.
    """

    megatron: str
    sections: tuple[Section, ...]
    rest: Shape  # of the parameter, behind its rows
    in_float32: ClassVar[bool] = False

    @property
    def stored(self) -> tuple[str, ...]:
        """The tensors of a checkpoint of Megatron's that hold it."""
        return tuple(f"{self.megatron}.{section.name}" for section in self.sections)

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        rows: dict[str, int] = {}
        for section in self.sections:
            rows[section.hf] = rows.get(section.hf, 0) + section.rows(arch)
        return {name: (count, *self.rest(arch)) for name, count in rows.items()}

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._pieces(lambda _: self.megatron, arch, tp, tp_rank)

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._pieces(lambda section: section.engine, arch, tp, tp_rank)

    def _pieces(
        self, name: Callable[[Section], str], arch: ModelArch, tp: int, tp_rank: int
    ) -> Iterator[Piece]:
        at: dict[str, int] = {}
        for section in self.sections:
            lo, hi = _share(section.rows(arch), tp, tp_rank)
            first, param = section.hf_at(arch), name(section)
            rows = (first + lo, first + hi)
            yield _rows(param, at.get(param, 0), section.hf, rows, (0, *self.rest(arch)))
            at[param] = at.get(param, 0) + hi - lo


@dataclass(frozen=True, kw_only=True)
class GateUp:
    """Gate and up projections, one over the other; each is cut by itself.

    So a rank holds [its rows of gate; its rows of up], not a run of rows of the whole.
    """

    megatron: str
    hf_gate: str
    hf_up: str
    engine: str
    rows: Size
    in_float32: ClassVar[bool] = False

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        shape = (self.rows(arch), arch.hidden_size)
        return {self.hf_gate: shape, self.hf_up: shape}

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._pieces(self.megatron, arch, tp, tp_rank)

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._pieces(self.engine, arch, tp, tp_rank)

    def _pieces(self, param: str, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        rows = _share(self.rows(arch), tp, tp_rank)
        shape = (self.rows(arch), arch.hidden_size)
        yield _rows(param, 0, self.hf_gate, rows, shape)
        yield _rows(param, rows[1] - rows[0], self.hf_up, rows, shape)


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """A tensor of files that holds a matrix of each expert of a layer (expert_stacks.py).

    It is no rule: everywhere but in files these matrices are tensors of their own.
    """

    hf: str
    of: tuple[str, ...]  # the tensors of one expert {e}, which stand over each other in it


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A rule whose Hugging Face tensors stand over each other in one, in the order of their names.

    Example: of the rule Qkv, with 8 rows of queries, 4 of keys and 4 of values. k_proj[2:4] is then
    qkv_proj[10:12].
    """

    rule: Rule
    hf: str

    @property
    def megatron(self) -> str:
        return self.rule.megatron

    @property
    def in_float32(self) -> bool:
        return self.rule.in_float32

    def hf_shapes(self, arch: ModelArch) -> dict[str, tuple[int, ...]]:
        shapes = list(self.rule.hf_shapes(arch).values())
        return {self.hf: (sum(rows for rows, *_ in shapes), *shapes[0][1:])}

    def megatron_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._stacked(arch, self.rule.megatron_pieces(arch, tp, tp_rank))

    def engine_pieces(self, arch: ModelArch, tp: int, tp_rank: int) -> Iterator[Piece]:
        return self._stacked(arch, self.rule.engine_pieces(arch, tp, tp_rank))

    def _stacked(self, arch: ModelArch, pieces: Iterator[Piece]) -> Iterator[Piece]:
        shapes = self.rule.hf_shapes(arch)
        ends = accumulate((rows for rows, *_ in shapes.values()), initial=0)
        first = dict(zip(shapes, ends, strict=False))  # the last end begins no tensor
        for piece in pieces:
            (lo, hi), *rest = piece.box
            at = first[piece.hf]
            yield replace(piece, hf=self.hf, box=((at + lo, at + hi), *rest))
