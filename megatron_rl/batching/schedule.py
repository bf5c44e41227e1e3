"""Kept samples travel from the ranks that sampled them to the ranks that train them.

Example: two ranks, each a data-parallel replica. Rank 0 has sampled group 7, of which two samples
of 5 and 4 tokens are kept, rank 1 group 8, of which one of 3 tokens is. All belong to update 0.

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
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.batching.balance import balance, fill_rows
from megatron_rl.parallel.collectives import all_gather_objects, send_messages
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import Sample

Key = tuple[int, int, int]  # update, group_id, index: the same order of samples on every rank

UNITS_EACH = 4


class Length(NamedTuple):
    """Tokens of a sample."""

    prompt: int
    response: int


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """The samples after they have travelled."""

    samples: list[Sample]  # those that this rank's replica trains, by update, group and index
    num_samples: Counter[int]  # update -> number of samples with a gradient over all replicas
    num_tokens: int  # of all samples, over all replicas
    num_repeated: int  # of those, tokens of prompts that another sample of the update has as well


@dataclass(frozen=True, kw_only=True)
class Together:
    """Which samples travel and are packed as one unit, and how many tokens that is."""

    keep_groups_whole: bool = False
    share_up_to: int | None = None  # most tokens of a unit that shares a prompt; None: none does

    def units(self, lengths: Mapping[Key, Length]) -> dict[Key, list[Key]]:
        """Samples by unit: each alone, a whole group, or as many of a group as share a prompt.

        A unit is told by the key of its first sample. The order of both is that of the keys.
        """
        units: dict[Key, list[Key]] = {}
        unit: Key | None = None
        for key in sorted(lengths):
            is_next = unit is not None and unit[:2] == key[:2]
            if unit is None or not is_next or not self._fits([*units[unit], key], lengths):
                unit = key
            units.setdefault(unit, []).append(key)
        return units

    def _fits(self, keys: Sequence[Key], lengths: Mapping[Key, Length]) -> bool:
        if self.keep_groups_whole:
            return True
        return self.share_up_to is not None and self.tokens(keys, lengths) <= self.share_up_to

    def tokens(self, keys: Sequence[Key], lengths: Mapping[Key, Length]) -> int:
        """Tokens of a unit in a row."""
        responses = sum(lengths[key].response for key in keys)
        prompts = [lengths[key].prompt for key in keys]
        return responses + (sum(prompts) if self.share_up_to is None else max(prompts))


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
    own = {_key(sample): (_length(sample), sample.has_gradient) for sample in samples}
    everywhere: dict[Key, tuple[Length, bool]] = {}
    for part in all_gather_objects(own, groups.world):
        everywhere |= part
    lengths = {key: length for key, (length, _) in everywhere.items()}
    together = Together(keep_groups_whole=keep_groups_whole, share_up_to=share_up_to)
    replica_of = _replicas(lengths, groups.layout.dp, together)
    layout = groups.layout
    ranks_of = [
        [rank for rank in range(layout.world_size) if layout.coordinates(rank).dp_rank == replica]
        for replica in range(layout.dp)
    ]
    staying, messages, to_ranks = [], [], []
    for sample in samples:
        ranks = ranks_of[replica_of[_key(sample)]]
        if groups.rank in ranks:
            staying.append(sample)
        others = [rank for rank in ranks if rank != groups.rank]
        if others:
            messages += [_encode(sample)] * len(others)
            to_ranks += others
    arrived = _decode(send_messages(messages, to_ranks, groups.world))
    return Distributed(
        samples=sorted([*staying, *arrived], key=_key),
        num_samples=Counter(
            key[0] for key, (_, has_gradient) in everywhere.items() if has_gradient
        ),
        num_tokens=sum(map(sum, lengths.values())),
        num_repeated=_repeated(lengths),
    )


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
    units = list(together.units(lengths).values())
    filled = fill_rows([together.tokens(unit, lengths) for unit in units], budget)
    rows = [[by_key[key] for index in row for key in units[index]] for row in filled]
    missing = -len(rows) % count_multiple or (count_multiple if not rows else 0)
    return rows + [[] for _ in range(missing)]


def _replicas(lengths: dict[Key, Length], dp: int, together: Together) -> dict[Key, int]:
    """The data-parallel replica that trains each sample."""
    replica_of: dict[Key, int] = {}
    for update in sorted({key[0] for key in lengths}):
        of_update = {key: length for key, length in lengths.items() if key[0] == update}
        units = list(_small(together, of_update, dp).units(of_update).values())
        tokens = [together.tokens(unit, of_update) for unit in units]
        for replica, share in enumerate(balance(tokens, dp)):
            replica_of |= {key: replica for index in share for key in units[index]}
    return replica_of


def _small(together: Together, lengths: Mapping[Key, Length], dp: int) -> Together:
    """Units of which every replica gets UNITS_EACH or more, so that all can be given alike."""
    if together.share_up_to is None or dp == 1:
        return together
    total = sum(length.prompt + length.response for length in lengths.values())
    return replace(together, share_up_to=min(together.share_up_to, total // (UNITS_EACH * dp)))


def _length(sample: Sample) -> Length:
    return Length(len(sample.prompt_tokens), len(sample.response_tokens))


def _key(sample: Sample) -> Key:
    return sample.update, sample.group_id, sample.index


def _encode(sample: Sample) -> Tensor:
    """One int64 vector that tells its own lengths; floats, experts and supports travel by their
    bits.

    Example: group 7, index 1, update 0, prompt [5, 9], response [2], advantage 0.5, no log-probs,
    experts and support is [7, 1, 0, 2, 1, 0, 1, 0, 0, 0, -1, 5, 9, 2, 0x3FE0000000000000].
    """
    has_logprobs = sample.rollout_logprobs is not None
    head = torch.tensor(
        [
            sample.group_id,
            sample.index,
            sample.update,
            len(sample.prompt_tokens),
            len(sample.response_tokens),
            int(has_logprobs),
            int(sample.has_gradient),
            *_shape_of(sample.experts),
            -1 if sample.support is None else sample.support.size(1),
        ]
    )
    floats = [torch.tensor([sample.advantage], dtype=torch.float64)]
    if sample.rollout_logprobs is not None:
        floats.append(sample.rollout_logprobs.double())
    return torch.cat(
        [
            head,
            sample.prompt_tokens,
            sample.response_tokens,
            torch.cat(floats).view(torch.int64),
            _words_of(sample.experts),
            _words_of(sample.support),
        ]
    )


def _shape_of(experts: Tensor | None) -> tuple[int, int, int]:
    """Layers, experts of a token, and the bytes of one number; zeros where there are none."""
    return (0, 0, 0) if experts is None else (*experts.shape[1:], experts.itemsize)


def _words_of(told: Tensor | None) -> Tensor:
    """Its bytes as int64, with zeros behind."""
    if told is None:
        return torch.empty(0, dtype=torch.int64)
    told = told.contiguous().view(torch.uint8).flatten()
    return F.pad(told, (0, -len(told) % 8)).view(torch.int64)


def _decode(stream: Tensor) -> list[Sample]:
    """The samples of encoded vectors that stand one behind the other."""
    samples = []
    at = 0

    def take(count: int) -> Tensor:
        nonlocal at
        part = stream[at : at + count]
        at += count
        return part

    def values(count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        return take(-(-size // 8)).view(torch.uint8)[:size].clone().view(dtype)

    while at < len(stream):
        group_id, index, update, prompt, response, has_logprobs, has_gradient = take(7).tolist()
        layers, top_k, itemsize, width = take(4).tolist()
        prompt_tokens, response_tokens = take(prompt), take(response)
        advantage = take(1).view(torch.float64).item()
        logprobs = take(response).view(torch.float64).float() if has_logprobs else None
        experts = None
        if itemsize:
            kind = torch.uint8 if itemsize == 1 else torch.int16
            told = values((prompt + response - 1) * layers * top_k, kind)
            experts = told.view(-1, layers, top_k)
        support = None if width < 0 else values(response * width, torch.int32).view(response, width)
        samples.append(
            Sample(
                group_id=group_id,
                index=index,
                update=update,
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                advantage=advantage,
                has_gradient=bool(has_gradient),
                rollout_logprobs=logprobs,
                experts=experts,
                support=support,
            )
        )
    return samples
