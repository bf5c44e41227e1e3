"""Kept samples from the ranks that sampled them to the ranks that train them."""

from collections import Counter
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


def distribute(samples: Sequence[Sample], groups: Groups) -> Distributed:
    """This data-parallel rank's samples of the iteration, balanced by tokens within each update.

    Each kept sample lies on one rank before (its group's owner) and on all ranks of one
    data-parallel replica after. Only kept samples travel. Every rank must call it.
    """
    lengths = {_key(sample): sample.num_tokens for sample in samples}
    everywhere: dict[Key, int] = {}
    for part in all_gather_objects(lengths, groups.host):
        everywhere |= part
    replica_of = _replicas(everywhere, groups.layout.dp)
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


def rows_of(samples: Sequence[Sample], budget: int, *, count_multiple: int) -> list[list[Sample]]:
    """The samples of one update in packed rows; at least one row, and a multiple of them.

    Rows may be empty: a rank without samples still takes part in the reduction of gradients, and
    the interleaved pipeline schedule wants a multiple of the pipeline size.
    """
    rows = [
        [samples[index] for index in row]
        for row in fill_rows([sample.num_tokens for sample in samples], budget)
    ]
    missing = -len(rows) % count_multiple or (count_multiple if not rows else 0)
    return rows + [[] for _ in range(missing)]


def _replicas(lengths: dict[Key, int], dp: int) -> dict[Key, int]:
    """Data-parallel rank of every sample."""
    replica_of: dict[Key, int] = {}
    for update in sorted({key[0] for key in lengths}):
        keys = sorted(key for key in lengths if key[0] == update)
        for replica, share in enumerate(balance([lengths[key] for key in keys], dp)):
            replica_of |= {keys[index]: replica for index in share}
    return replica_of


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
