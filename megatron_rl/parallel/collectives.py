"""Collectives outside of the model: ranks tell each other errors, sums and samples."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.errors import RunError

Item = TypeVar("Item")


def agree_or_raise(error: Exception | None, group: dist.ProcessGroup) -> None:
    """Raise on all ranks when any rank has an error; every rank of group must call it.

    A check that fails on one rank only would leave the others waiting in the next collective.

    Raises:
        RunError: on ranks without an error of their own; it tells the error of the first other.
    """
    failed = torch.tensor(int(error is not None))
    dist.all_reduce(failed, group=group)
    if not failed:
        return
    told: list[str | None] = [None] * dist.get_world_size(group)
    text = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(told, text, group=group)
    if error is not None:
        raise error
    rank, first = next((rank, text) for rank, text in enumerate(told) if text is not None)
    raise RunError(f"rank {rank} failed: {first}")


def all_or_none(work: Callable[[], None], group: dist.ProcessGroup) -> None:
    """Do this rank's part of some work; an error of any rank's part is raised on all ranks.

    The work must need no other rank: where one fails inside of a collective, the others wait there.
    """
    error: Exception | None = None
    try:
        work()
    except Exception as caught:
        error = caught
    agree_or_raise(error, group)


def nothing() -> None:
    """Do nothing: the part of a rank that has no part in the work of all_or_none."""


def same_or_raise(name: str, value: str, rule: str, group: dist.ProcessGroup) -> None:
    """Raise on all ranks unless all bring the same value; every rank of group must call it.

    Args:
        name: what the value is, for the message.
        value: this rank's value.
        rule: why it must be the same, and the way out.
        group: the ranks that must agree.

    Raises:
        RunError: the values differ; it names each with the ranks that have it.
    """
    ranks: dict[str, list[int]] = {}
    for rank, told in enumerate(all_gather_objects(value, group)):
        ranks.setdefault(told, []).append(rank)
    if len(ranks) > 1:
        who = "; ".join(f"{told!r} on ranks {holders}" for told, holders in ranks.items())
        raise RunError(f"{name}: {who}: {rule}")


def sum_over(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """Element-wise float64 sum over the group; the same bits on every rank."""
    total = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(total, group=group)
    result: list[float] = total.tolist()
    return result


def max_over(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """Element-wise float64 maximum over the group."""
    total = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    result: list[float] = total.tolist()
    return result


def all_gather_objects(item: Item, group: dist.ProcessGroup) -> list[Item]:
    """Small Python objects of all ranks, in rank order."""
    items: list[Item] = [item] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def gather_objects(item: Item, group: dist.ProcessGroup) -> list[Item]:
    """Python objects of all ranks, in rank order, on the group's first rank; [] on the others."""
    is_first = dist.get_rank(group) == 0
    items: list[Item] | None = [item] * dist.get_world_size(group) if is_first else None
    dist.gather_object(item, items, group=group, group_dst=0)
    return items or []


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The int64 rows [n, k] of all ranks, in rank order; n may differ from rank to rank."""
    counts = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([rows.size(0)]), group=group)
    most = max(map(int, counts))
    each = [rows.new_empty(most, rows.size(1)) for _ in counts]
    dist.all_gather(each, F.pad(rows, (0, 0, 0, most - rows.size(0))), group=group)
    return torch.cat([part[: int(count)] for part, count in zip(each, counts, strict=True)])


def send_messages(
    messages: Sequence[Tensor], to_ranks: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send message k to rank to_ranks[k]; returns all that arrives here, as one vector.

    It holds the messages by sender, each sender's in its own order, and nothing between them: a
    message must tell its own length. Messages are int64 vectors on the CPU. Every rank of the group
    must call it. Cost: one all-to-all of the sizes, and one of the bytes that are needed.
    """
    order = sorted(range(len(messages)), key=lambda k: to_ranks[k])
    sizes = [0] * dist.get_world_size(group)
    for message, rank in zip(messages, to_ranks, strict=True):
        sizes[rank] += message.numel()
    outgoing = torch.cat([torch.empty(0, dtype=torch.int64), *(messages[k] for k in order)])
    arriving = torch.empty(len(sizes), dtype=torch.int64)
    dist.all_to_all_single(arriving, torch.tensor(sizes), group=group)
    incoming_sizes = arriving.tolist()
    incoming = torch.empty(sum(incoming_sizes), dtype=outgoing.dtype)
    dist.all_to_all_single(incoming, outgoing, incoming_sizes, sizes, group=group)
    return incoming
