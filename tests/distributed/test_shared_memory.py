"""Collectives in shared memory: against sums and places worked out by hand from every rank's input,
and what ranks say that meet nobody, or somebody who came for something else.
"""

import os
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import our_path_for_the_server, run_on_ranks, server, wait_for_all

from megatron_rl.errors import InputError
from megatron_rl.parallel import shared_memory
from megatron_rl.parallel.shared_memory import SLOT_BYTES, SWITCH, SharedMemoryGroup

SIZES = (0, 1, 7, 4099, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 300_001)  # below a slot, and above it
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)
WORLDS = (1, 2, 3)


def given(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings; every rank can work out that of all."""
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size + rank))
    return (numbers * 10).to(dtype)


def in_order(parts: list[torch.Tensor], join) -> torch.Tensor:
    """parts joined one after the other; 16 bits in float32, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = join(total, part.to(wide))
    return total.to(dtype)


JOINS = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}


def _reductions() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for dtype in DTYPES:
        for size in SIZES:
            parts = [given(other, size * world, dtype) for other in range(world)]
            for op, join in JOINS.items():
                expected = in_order(parts, join)
                x = parts[rank].clone()
                dist.all_reduce(x, op)
                assert torch.equal(x, expected), (dtype, size, op)
                own = torch.empty(size, dtype=dtype)
                dist.reduce_scatter_tensor(own, parts[rank], op)
                assert torch.equal(own, expected.view(world, size)[rank]), (dtype, size, op)
                whole = parts[rank].clone()
                place = whole.view(world, size)[rank]  # as Megatron-Core reduces gradients
                dist.reduce_scatter_tensor(place, whole, op)
                assert torch.equal(place, own), (dtype, size, op)


def _copies() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    for dtype in (*DTYPES, torch.bool, torch.uint8):
        for size in SIZES:
            parts = [given(other, size, dtype) for other in range(world)]
            gathered = torch.empty(world * size, dtype=dtype)
            dist.all_gather_into_tensor(gathered, parts[rank])
            assert torch.equal(gathered, torch.cat(parts)), (dtype, size)
            in_place = torch.empty_like(gathered)  # as Megatron-Core gathers weights
            in_place.view(world, size)[rank] = parts[rank]
            dist.all_gather_into_tensor(in_place, in_place.view(world, size)[rank])
            assert torch.equal(in_place, gathered), (dtype, size)
            each = [torch.empty(size, dtype=dtype) for _ in range(world)]
            dist.all_gather(each, parts[rank])
            assert torch.equal(torch.cat(each), gathered), (dtype, size)
            x = parts[rank].clone()
            dist.broadcast(x, world - 1)
            assert torch.equal(x, parts[-1]), (dtype, size)


def _exchanges() -> None:
    """Every pair of ranks exchanges another number of rows, some of them none."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for unit in (0, 1, 5_000):  # the last needs several rounds
        rows = [[unit * ((a + 2 * b) % 3) for b in range(world)] for a in range(world)]
        brought = [
            given(other, sum(rows[other]) * 3, torch.float32).view(-1, 3) for other in range(world)
        ]
        received = [rows[other][rank] for other in range(world)]
        out = torch.empty(sum(received), 3)
        dist.all_to_all_single(out, brought[rank], received, rows[rank])
        expected = [brought[other].split(rows[other])[rank] for other in range(world)]
        assert torch.equal(out, torch.cat(expected)), unit
        again = torch.empty_like(out)  # Megatron-Core counts tokens of experts in numpy
        dist.all_to_all_single(again, brought[rank], np.array(received), np.array(rows[rank]))
        assert torch.equal(again, out), unit
    even = torch.empty(2 * world)
    dist.all_to_all_single(even, torch.arange(2.0 * world) + 100 * rank)
    expected = [torch.arange(2 * rank, 2 * rank + 2) + 100 * other for other in range(world)]
    assert torch.equal(even, torch.cat(expected).float())


def _other_forms() -> None:
    """Strides, calls in the background and together, objects, leaves, and what goes over gloo."""
    world, rank = dist.get_world_size(), dist.get_rank()
    assert shared_memory.is_in(dist.group.WORLD)
    total = sum(range(1, world + 1))
    strided = torch.full((4, 6), float(rank + 1))[:, ::2]
    work = dist.all_reduce(strided, async_op=True)
    assert work.wait()
    assert work.is_completed()
    assert torch.equal(strided, torch.full((4, 3), float(total)))
    leaf = torch.full((3,), float(rank + 1), requires_grad=True)
    dist.broadcast(leaf, 0)
    assert leaf.tolist() == [1.0, 1.0, 1.0]
    two = [torch.full((n,), rank + 1.0) for n in (2, 3)]
    with dist.distributed_c10d._coalescing_manager(async_ops=True) as manager:
        for one in two:
            dist.all_reduce(one)
    manager.wait()
    assert all(torch.equal(one, torch.full_like(one, total)) for one in two)
    told = [None] * world
    dist.all_gather_object(told, {"rank": rank})
    assert told == [{"rank": other} for other in range(world)]
    product = torch.tensor([rank + 2.0])
    dist.all_reduce(product, dist.ReduceOp.PRODUCT)
    assert product.item() == torch.arange(2.0, world + 2).prod().item()
    if world > 1:
        message, neighbour = torch.tensor([float(rank)]), (rank + 1) % world
        sent = dist.isend(message, neighbour)
        came = torch.empty(1)
        dist.recv(came, (rank - 1) % world)
        sent.wait()
        assert came.item() == (rank - 1) % world
    for _ in range(1000):  # gloo's threads let go of tensors while Python calls the next one
        dist.reduce(torch.ones(2), 0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("body", [_reductions, _copies, _exchanges, _other_forms])
def test_what_ranks_find_is_what_hand_work_gives(body, world):
    run_on_ranks(world, body)


def _fails(body, *expected: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        body()
    for text in expected:
        assert text in str(caught.value), caught.value


def _ends_while_another_waits(rank: int, store: str) -> None:
    """A job of its own, of which rank 1 is killed."""
    group = SharedMemoryGroup(dist.FileStore(store, 2), rank, 2, timedelta(seconds=60))
    group.allreduce([torch.ones(1)], dist.AllreduceOptions())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    _fails(
        lambda: group.allreduce([torch.ones(1)], dist.AllreduceOptions()),
        "rank 1 of 2",
        "has ended",
    )
    assert time.monotonic() - start < 10
    os._exit(0)


def test_a_rank_that_is_killed_is_noticed(tmp_path):
    arguments = [(rank, str(tmp_path / "store")) for rank in range(2)]
    ranks = [server().Process(target=_ends_while_another_waits, args=args) for args in arguments]
    with our_path_for_the_server():
        for rank in ranks:
            rank.start()
    wait_for_all(ranks, deadline=time.monotonic() + 60)
    assert [rank.exitcode for rank in ranks] == [0, -signal.SIGKILL]


def _leaves() -> None:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 1:
        group.shutdown()
    else:
        _fails(lambda: dist.barrier(group=group), "has ended or left the group")
        _fails(lambda: dist.barrier(group=group), "met in vain before")
    dist.barrier()


def _different_things() -> None:
    group = dist.new_group([0, 1])
    body = (
        (lambda: dist.all_reduce(torch.ones(2), group=group))
        if dist.get_rank() == 0
        else (lambda: dist.broadcast(torch.ones(2), 0, group=group))
    )
    _fails(body, "is in ", "8 bytes")
    dist.barrier()


def _other_sizes() -> None:
    group = dist.new_group([0, 1])
    size = 2 + dist.get_rank()
    _fails(lambda: dist.all_reduce(torch.ones(size), group=group), "is in all_reduce")
    group = dist.new_group([0, 1])
    sent, received = [[1, 2], [3, 4]][dist.get_rank()], [1, 2]
    body = lambda: dist.all_to_all_single(  # noqa: E731
        torch.empty(3), torch.ones(sum(sent)), received, sent, group=group
    )
    came = (12, 8)[dist.get_rank()]  # of the three and two rows that the other rank sends
    _fails(body, f"received: expected {came} bytes")
    dist.barrier()


def _nobody_comes() -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=0.5))
    if dist.get_rank() == 0:
        _fails(lambda: dist.barrier(group=group), "did not come within 0.5")
    dist.barrier()


@pytest.mark.parametrize("body", [_leaves, _different_things, _other_sizes, _nobody_comes])
def test_what_goes_wrong_is_said(body):
    run_on_ranks(2, body)


def _asked_for_gloo() -> None:
    os.environ[SWITCH] = "0"
    group = dist.new_group([0, 1])
    assert not shared_memory.is_in(group)
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [2.0] * 3
    os.environ[SWITCH] = str(dist.get_rank())  # one rank has it, the other has not
    group = dist.new_group([0, 1])
    assert not shared_memory.is_in(group)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [4.0] * 3


def test_gloo_where_a_rank_is_told_to_use_it():
    run_on_ranks(2, _asked_for_gloo)


def test_any_other_answer_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "no")
    with pytest.raises(InputError, match=f"{SWITCH}=no.*unset {SWITCH}"):
        shared_memory.is_wanted()
