"""Which layers every pipeline stage holds, as Megatron-Core cuts a model; arithmetic alone.

With virtual pipelines a rank holds several stages: in the order of the network, chunk c of pipeline
rank r is stage c * pp + r.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Split:
    """How layers are shared where not every stage has as many.

    Either the ends have sizes of their own, and the ranks between share what is left, or embedding
    and loss stand for one layer each of the stage that they are on.

    Example: 7 layers on 4 ranks. last=1 makes stages of 2, 2, 2 and 1 layers, and so does
    counts_loss; first=2 with last=1 says the same.
    """

    first: int | None = None  # layers of the first pipeline rank, of all of its chunks
    last: int | None = None  # of the last one
    counts_embedding: bool = False
    counts_loss: bool = False

    @property
    def has_sizes(self) -> bool:
        return self.first is not None or self.last is not None

    @property
    def counts_ends(self) -> bool:
        return self.counts_embedding or self.counts_loss


EVEN = Split()


def stage_sizes(num_layers: int, pp: int, vpp: int, split: Split) -> tuple[int, ...] | None:
    """The number of layers of every stage; None: Megatron-Core cannot cut the model so."""
    if split.has_sizes:
        return None if split.counts_ends else _with_sizes(num_layers, pp, vpp, split)
    each, left = divmod(num_layers + split.counts_embedding + split.counts_loss, pp * vpp)
    if left or each == 0:
        return None
    sizes = [each] * (pp * vpp)
    sizes[0] -= split.counts_embedding
    sizes[-1] -= split.counts_loss
    return None if min(sizes) < 0 else tuple(sizes)


def _with_sizes(num_layers: int, pp: int, vpp: int, split: Split) -> tuple[int, ...] | None:
    first = [] if split.first is None else [split.first]
    last = [] if split.last is None else [split.last]
    between = pp - len(first) - len(last)
    rest = num_layers - sum(first) - sum(last)
    if between < 0 or rest < between or rest % max(between, 1) or (rest and not between):
        return None
    of_ranks = [*first, *[rest // max(between, 1)] * between, *last]
    if any(size % vpp for size in of_ranks):
        return None
    return tuple(size // vpp for size in of_ranks) * vpp


@functools.cache
def layers_of_stages(num_layers: int, pp: int, vpp: int, split: Split) -> tuple[range, ...]:
    """The layers of every stage, in the order of the network."""
    sizes = stage_sizes(num_layers, pp, vpp, split)
    assert sizes is not None, "parallel/refusals.py lets no such layout through"
    ends = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
    return tuple(range(end - size, end) for end, size in zip(ends, sizes, strict=True))


def told_sizes(sizes: Sequence[int]) -> str:
    """Sizes of stages as they are told: "3, 5 (6 times), 3" of eight."""
    told: list[str] = []
    for size, run in itertools.groupby(sizes):
        count = len(list(run))
        told += [str(size)] * count if count < 4 else [f"{size} ({count} times)"]
    return ", ".join(told)


def splits_that_work(num_layers: int, pp: int, vpp: int) -> list[Split]:
    """The best split of each kind that cuts this model: even, else of the flattest stages."""
    if stage_sizes(num_layers, pp, vpp, EVEN) is not None:
        return [EVEN]
    counting = [
        Split(counts_loss=True),
        Split(counts_embedding=True),
        Split(counts_embedding=True, counts_loss=True),
    ]
    found = []
    for kind in (list(_sizes_to_try(num_layers, pp, vpp)), counting):
        possible = [(stage_sizes(num_layers, pp, vpp, split), split) for split in kind]
        flat = [(max(sizes), -min(sizes), split) for sizes, split in possible if sizes is not None]
        if flat:
            found.append(min(flat, key=lambda one: one[:2])[2])
    return found


def _sizes_to_try(num_layers: int, pp: int, vpp: int) -> Iterator[Split]:
    """Ends for ranks between that have the two numbers of layers nearest to the average."""
    average = num_layers // (pp * vpp) * vpp
    for between in (average, average + vpp):
        alone = num_layers - (pp - 1) * between
        if alone > 0:  # the last one has the loss besides
            ends = [Split(last=alone), Split(first=alone)]
            yield from ends if alone < between else reversed(ends)
        both = num_layers - (pp - 2) * between
        first = -(-both // (2 * vpp)) * vpp
        if pp > 2 and both > first > 0:
            yield Split(first=first, last=both - first)
