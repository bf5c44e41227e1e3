"""Kept samples travel from the ranks that sampled them to the ranks that train them.

Example: two ranks, each a data-parallel replica. Rank 0 has sampled group 7, of which two samples
of 5 and 4 tokens are kept, rank 1 group 8, of which one of 3 tokens is. All belong to update 0. The
last token of a sample predicts nothing and does not count.

1. Every rank tells every other its lengths by key: (0, 7, 0): 5, (0, 7, 1): 4, (0, 8, 0): 3.
2. Every rank balances them and finds the same: replica 0 trains the first sample (5 tokens),
   replica 1 the other two (7 tokens).
3. One all-to-all: rank 0 sends (0, 7, 1) to rank 1, and nothing else travels.
4. At a budget of 8 tokens rank 1 packs both of its samples into one row.

Where groups stay whole, a group is one unit of 9 or 3 tokens, and nothing travels at all. At TP 2 a
replica is two ranks, and whatever one of them trains is sent to both.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batching.balance import balance, fill_rows
from megatron_rl.batching.messages import decode, encode
from megatron_rl.parallel.collectives import gather_rows, send_messages
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.types import Sample

Key = tuple[int, int, int]  # update, group_id, index: the same order of samples on every rank

UNITS_EACH = 4


class Length(NamedTuple):
    """Tokens of a sample that go through the model."""

    prompt: int
    response: int


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """The samples after they have travelled."""

    samples: list[Sample]  # those that this rank's replica trains, by update, group and index
    num_samples: Counter[int]  # update -> number of samples with a gradient over all replicas
    num_tokens: int  # that go through the model, of all samples, over all replicas
    num_repeated: int  # of those, tokens of prompts that another sample of the update has as well


@dataclass(slots=True)
class Unit:
    """Samples that travel and are packed as one."""

    keys: list[Key]
    tokens: int  # in a row


@dataclass(frozen=True, kw_only=True)
class Together:
    """Which samples travel and are packed as one unit."""

    keep_groups_whole: bool = False
    share_up_to: int | None = None  # most tokens of a unit that shares a prompt; None: none does

    def units(self, lengths: Mapping[Key, Length]) -> list[Unit]:
        """Samples by unit: each alone, a whole group, or as many of a group as share a prompt.

        The order of units, and of the samples of one, is that of the keys.
        """
        units: list[Unit] = []
        group = None
        for key, length in sorted(lengths.items()):
            further = length.response + (length.prompt if self.share_up_to is None else 0)
            if key[:2] == group and self._fits(units[-1].tokens + further):
                units[-1].keys.append(key)
                units[-1].tokens += further
            else:
                units.append(Unit([key], sum(length)))
                group = key[:2]
        return units

    def _fits(self, tokens: int) -> bool:
        if self.keep_groups_whole:
            return True
        return self.share_up_to is not None and tokens <= self.share_up_to


def distribute(
    samples: Sequence[Sample],
    groups: Groups,
    *,
    keep_groups_whole: bool = False,
    share_up_to: int | None = None,
) -> Distributed:
    """The samples that this rank's replica trains, balanced by tokens within each update.

    samples: the kept samples of the groups that this rank owns. Each sample lies on one rank before
    and on all ranks of one data-parallel replica after. Every rank must call it. share_up_to: most
    tokens of samples that share a prompt; None: prompts are not shared.
    """
    lengths: dict[Key, Length] = {}
    num_samples: Counter[int] = Counter()
    for *key, prompt, response, has_gradient in _rows_of_all(samples, groups.world):
        update, group_id, index = key
        lengths[update, group_id, index] = Length(prompt, response)
        num_samples[update] += has_gradient
    together = Together(keep_groups_whole=keep_groups_whole, share_up_to=share_up_to)
    replica_of = _replicas(lengths, groups.layout.dp, together)
    leaving: dict[int, list[Sample]] = {}
    for sample in samples:
        leaving.setdefault(replica_of[_key(sample)], []).append(sample)
    ranks_of = _ranks_of(groups.layout)
    staying: list[Sample] = []
    messages: list[Tensor] = []
    to_ranks: list[int] = []
    for replica, theirs in sorted(leaving.items()):
        if groups.rank in ranks_of[replica]:
            staying = theirs
        others = [rank for rank in ranks_of[replica] if rank != groups.rank]
        if others:
            messages += [encode(theirs)] * len(others)
            to_ranks += others
    arrived = decode(send_messages(messages, to_ranks, groups.world))
    return Distributed(
        samples=sorted([*staying, *arrived], key=_key),
        num_samples=num_samples,
        num_tokens=sum(map(sum, lengths.values())),
        num_repeated=_repeated(lengths),
    )


def _rows_of_all(samples: Sequence[Sample], world: dist.ProcessGroup) -> list[list[int]]:
    """Update, group_id, index, Length and has_gradient of all samples."""
    own = [(*_key(s), *_length(s), int(s.has_gradient)) for s in samples]
    # A tensor, since Python takes eight times as long to read objects that were sent.
    table = gather_rows(torch.tensor(own, dtype=torch.int64).view(len(own), 6), world)
    rows: list[list[int]] = table.tolist()
    return rows


def _ranks_of(layout: Layout) -> list[list[int]]:
    """The ranks of each data-parallel replica."""
    ranks_of: list[list[int]] = [[] for _ in range(layout.dp)]
    for rank in range(layout.world_size):
        ranks_of[layout.coordinates(rank).dp_rank].append(rank)
    return ranks_of


def _repeated(lengths: Mapping[Key, Length]) -> int:
    """Tokens of prompts that stand again, for another response of the same update."""
    once = {key[:2]: length.prompt for key, length in lengths.items()}
    return sum(length.prompt for length in lengths.values()) - sum(once.values())


def rows_of(
    samples: Sequence[Sample],
    budget: int,
    *,
    count_multiple: int,
    keep_groups_whole: bool = False,
    share_prompts: bool = False,
) -> list[list[Sample]]:
    """The samples of one update in packed rows of at most `budget` tokens.

    There is at least one row, and the number of rows is a multiple of count_multiple; rows may be
    empty. A rank without samples still takes part in the reduction of gradients, and Megatron's
    interleaved pipeline schedule takes only multiples of the pipeline size.
    """
    by_key = {_key(sample): sample for sample in samples}
    lengths = {key: _length(sample) for key, sample in by_key.items()}
    together = Together(
        keep_groups_whole=keep_groups_whole, share_up_to=budget if share_prompts else None
    )
    units = together.units(lengths)
    filled = fill_rows([unit.tokens for unit in units], budget)
    rows = [[by_key[key] for index in row for key in units[index].keys] for row in filled]
    missing = -len(rows) % count_multiple or (count_multiple if not rows else 0)
    return rows + [[] for _ in range(missing)]


def _replicas(lengths: dict[Key, Length], dp: int, together: Together) -> dict[Key, int]:
    """The data-parallel replica that trains each sample."""
    of_updates: dict[int, dict[Key, Length]] = {}
    for key, length in lengths.items():
        of_updates.setdefault(key[0], {})[key] = length
    replica_of: dict[Key, int] = {}
    for of_update in of_updates.values():
        units = _small(together, of_update, dp).units(of_update)
        for replica, share in enumerate(balance([unit.tokens for unit in units], dp)):
            replica_of |= {key: replica for index in share for key in units[index].keys}
    return replica_of


def _small(together: Together, lengths: Mapping[Key, Length], dp: int) -> Together:
    """Units of which every replica gets UNITS_EACH or more, so that all can be given alike."""
    if together.share_up_to is None or dp == 1:
        return together
    total = sum(length.prompt + length.response for length in lengths.values())
    return replace(together, share_up_to=min(together.share_up_to, total // (UNITS_EACH * dp)))


def _length(sample: Sample) -> Length:
    return Length(sample.num_prompt_tokens, sample.num_inputs - sample.num_prompt_tokens)


def _key(sample: Sample) -> Key:
    return sample.update, sample.group_id, sample.index
