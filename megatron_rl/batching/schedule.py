"""Kept samples from the ranks that sampled them to the ranks that train them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.batching.balance import balance, fill_rows
from megatron_rl.parallel.collectives import all_gather_objects, send_rows
from megatron_rl.parallel.groups import Groups
from megatron_rl.types import Sample

Key = tuple[int, int, int]  # update, group_id, index: the same order of samples on every rank


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """Samples after they have travelled."""

    samples: list[Sample]  # of this data-parallel rank, by update, group and index
    num_samples: Counter[int]  # update -> samples over all ranks


def distribute(
    samples: Sequence[Sample], groups: Groups, *, keep_groups_whole: bool = False
) -> Distributed:
    """This data-parallel rank's samples of the iteration, balanced by tokens within each update.

    Each kept sample lies on one rank before (its group's owner) and on all ranks of one
    data-parallel replica after. Only kept samples travel. Every rank must call it.
    """
    lengths = {_key(sample): sample.num_tokens for sample in samples}
    everywhere: dict[Key, int] = {}
    for part in all_gather_objects(lengths, groups.host):
        everywhere |= part
    replica_of = _replicas(everywhere, groups.layout.dp, keep_groups_whole=keep_groups_whole)
    layout = groups.layout
    ranks_of = [
        [rank for rank in range(layout.world_size) if layout.coordinates(rank).dp_rank == replica]
        for replica in range(layout.dp)
    ]
    rows, to_ranks = [], []
    for sample in samples:
        row = _encode(sample)
        for rank in ranks_of[replica_of[_key(sample)]]:
            rows.append(row)
            to_ranks.append(rank)
    arrived = _decode(send_rows(rows, to_ranks, groups.host))
    return Distributed(
        samples=sorted(arrived, key=_key),
        num_samples=Counter(update for update, _, _ in everywhere),
    )


def rows_of(
    samples: Sequence[Sample], budget: int, *, count_multiple: int, keep_groups_whole: bool = False
) -> list[list[Sample]]:
    """The samples of one update in packed rows; at least one row, and a multiple of them.

    Rows may be empty: a rank without samples still takes part in the reduction of gradients, and
    the interleaved pipeline schedule wants a multiple of the pipeline size.
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
    """Data-parallel rank of every sample."""
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
    """What travels and is packed together: a sample, or all of its group."""
    update, group_id, index = key
    return (update, group_id, 0 if keep_groups_whole else index)


def _key(sample: Sample) -> Key:
    return sample.update, sample.group_id, sample.index


def _encode(sample: Sample) -> Tensor:
    """One int64 row that describes itself; floats travel by their bits."""
    has_logprobs = sample.rollout_logprobs is not None
    head = torch.tensor(
        [
            sample.group_id,
            sample.index,
            sample.update,
            len(sample.prompt_tokens),
            len(sample.response_tokens),
            int(has_logprobs),
        ]
    )
    floats = [torch.tensor([sample.advantage], dtype=torch.float64)]
    if sample.rollout_logprobs is not None:
        floats.append(sample.rollout_logprobs.double())
    return torch.cat(
        [head, sample.prompt_tokens, sample.response_tokens, torch.cat(floats).view(torch.int64)]
    )


def _decode(stream: Tensor) -> list[Sample]:
    samples = []
    at = 0

    def take(count: int) -> Tensor:
        nonlocal at
        part = stream[at : at + count]
        at += count
        return part

    while at < len(stream):
        group_id, index, update, prompt, response, has_logprobs = take(6).tolist()
        prompt_tokens, response_tokens = take(prompt), take(response)
        advantage = take(1).view(torch.float64).item()
        logprobs = take(response).view(torch.float64).float() if has_logprobs else None
        samples.append(
            Sample(
                group_id=group_id,
                index=index,
                update=update,
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                advantage=advantage,
                rollout_logprobs=logprobs,
            )
        )
    return samples
