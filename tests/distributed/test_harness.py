import time

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks


def test_a_failing_rank_tells_its_story_first():
    with pytest.raises(AssertionError, match=r"(?s)--- rank1\n.*fail_on_rank_one.*no such thing"):
        run_on_ranks(2, fail_on_rank_one)


def test_a_rank_that_hangs_is_shown_where_it_does():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)--- rank0\n.*in hang_on_rank_zero"):
        run_on_ranks(2, hang_on_rank_zero, timeout_s=3.0)
    assert time.monotonic() - start < 60


def test_ranks_talk_to_each_other():
    run_on_ranks(3, add_up, 10)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("no such thing")
    dist.barrier()


def hang_on_rank_zero() -> None:
    if dist.get_rank() == 0:
        time.sleep(1000)


def add_up(base: int) -> None:
    total = torch.tensor([base + dist.get_rank()])
    dist.all_reduce(total)
    assert total.item() == 33
