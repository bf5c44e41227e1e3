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

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.batching.balance import balance, fill_rows
from megatron_rl.parallel.collectives import all_gather_objects, send_messages
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import Sample

Key = tuple[int, int, int]  # update, group_id, index: the same order of samples on every rank


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """The samples after they have travelled."""

    samples: list[Sample]  # those that this rank's replica trains, by update, group and index
    num_samples: Counter[int]  # update -> number of samples with a gradient over all replicas


def distribute(
    samples: Sequence[Sample], groups: Groups, *, keep_groups_whole: bool = False
) -> Distributed:
    """The samples that this rank's replica trains, balanced by tokens within each update.

    samples: the kept samples of the groups that this rank owns. Each sample lies on one rank before
    and on all ranks of one data-parallel replica after. Every rank must call it.
    """
    own = {_key(sample): (sample.num_tokens, sample.has_gradient) for sample in samples}
    everywhere: dict[Key, tuple[int, bool]] = {}
    for part in all_gather_objects(own, groups.world):
        everywhere |= part
    lengths = {key: length for key, (length, _) in everywhere.items()}
    replica_of = _replicas(lengths, groups.layout.dp, keep_groups_whole=keep_groups_whole)
    layout = groups.layout
    ranks_of = [
        [rank for rank in range(layout.world_size) if layout.coordinates(rank).dp_rank == replica]
        for replica in range(layout.dp)
    ]
    messages, to_ranks = [], []
    for sample in samples:
        message = _encode(sample)
        for rank in ranks_of[replica_of[_key(sample)]]:
            messages.append(message)
            to_ranks.append(rank)
    arrived = _decode(send_messages(messages, to_ranks, groups.world))
    return Distributed(
        samples=sorted(arrived, key=_key),
        num_samples=Counter(
            key[0] for key, (_, has_gradient) in everywhere.items() if has_gradient
        ),
    )


def rows_of(
    samples: Sequence[Sample], budget: int, *, count_multiple: int, keep_groups_whole: bool = False
) -> list[list[Sample]]:
    """The samples of one update in packed rows of at most `budget` tokens.

    There is at least one row, and the number of rows is a multiple of count_multiple; rows may be
    empty. A rank without samples still takes part in the reduction of gradients, and Megatron's
    interleaved pipeline schedule takes only multiples of the pipeline size.
    """
    units: dict[Key, list[Sample]] = {}
    for sample in samples:
        units.setdefault(_unit(_key(sample), keep_groups_whole), []).append(sample)
    members = list(units.values())
    lengths = [sum(sample.num_tokens for sample in unit) for unit in members]
    rows = [
        [sample for index in row for sample in members[index]] for row in fill_rows(lengths, budget)
    ]
    missing = -len(rows) % count_multiple or (count_multiple if not rows else 0)
    return rows + [[] for _ in range(missing)]


def _replicas(lengths: dict[Key, int], dp: int, *, keep_groups_whole: bool) -> dict[Key, int]:
    """The data-parallel replica that trains each sample."""
    units: defaultdict[Key, int] = defaultdict(int)
    for key, length in lengths.items():
        units[_unit(key, keep_groups_whole)] += length
    replica_of: dict[Key, int] = {}
    for update in sorted({unit[0] for unit in units}):
        keys = sorted(unit for unit in units if unit[0] == update)
        for replica, share in enumerate(balance([units[key] for key in keys], dp)):
            replica_of |= {keys[index]: replica for index in share}
    return {key: replica_of[_unit(key, keep_groups_whole)] for key in lengths}


def _unit(key: Key, keep_groups_whole: bool) -> Key:
    """The key of the unit that a sample travels and is packed with: itself, or all of its group.

    A group is told by the key of its first sample: (update, group_id, 0).
    """
    update, group_id, index = key
    return (update, group_id, 0 if keep_groups_whole else index)


def _key(sample: Sample) -> Key:
    return sample.update, sample.group_id, sample.index


def _encode(sample: Sample) -> Tensor:
    """One int64 vector that tells its own lengths; floats and experts travel by their bits.

    Example: group 7, index 1, update 0, prompt [5, 9], response [2], advantage 0.5, no log-probs
    and no experts is [7, 1, 0, 2, 1, 0, 1, 0, 0, 0, 5, 9, 2, 0x3FE0000000000000].
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
        ]
    )


def _shape_of(experts: Tensor | None) -> tuple[int, int, int]:
    """Layers, experts of a token, and the bytes of one number; zeros where there are none."""
    return (0, 0, 0) if experts is None else (*experts.shape[1:], experts.itemsize)


def _words_of(experts: Tensor | None) -> Tensor:
    """Their bytes as int64, with zeros behind."""
    if experts is None:
        return torch.empty(0, dtype=torch.int64)
    told = experts.contiguous().view(torch.uint8).flatten()
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

    while at < len(stream):
        group_id, index, update, prompt, response, has_logprobs, has_gradient = take(7).tolist()
        layers, top_k, itemsize = take(3).tolist()
        prompt_tokens, response_tokens = take(prompt), take(response)
        advantage = take(1).view(torch.float64).item()
        logprobs = take(response).view(torch.float64).float() if has_logprobs else None
        experts = None
        if itemsize:
            size = (prompt + response - 1) * layers * top_k * itemsize
            told = take(-(-size // 8)).view(torch.uint8)[:size]
            kind = torch.uint8 if itemsize == 1 else torch.int16
            experts = told.clone().view(kind).view(-1, layers, top_k)
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
            )
        )
    return samples
