"""Rows that ranks have different numbers of, none among them, come together in rank order."""

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks

from megatron_rl.parallel.collectives import gather_rows

COUNTS = [(0, 0, 0), (3, 0, 1), (0, 2, 2)]


def own_of(rank: int, count: int) -> torch.Tensor:
    return torch.arange(count * 6).view(count, 6) + 100 * rank


def gathered_on_ranks() -> None:
    for counts in COUNTS:
        found = gather_rows(own_of(dist.get_rank(), counts[dist.get_rank()]), dist.group.WORLD)
        assert found.shape == (sum(counts), 6)
        assert torch.equal(found, torch.cat([own_of(*each) for each in enumerate(counts)]))


@pytest.mark.slow
def test_rows_of_three_ranks():
    run_on_ranks(3, gathered_on_ranks)
