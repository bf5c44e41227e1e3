"""Bytes that leave a device and come back, on a CPU: real storages, freed and filled again."""

import pytest
import torch

from megatron_rl.platforms import host_bytes
from megatron_rl.platforms.host_bytes import HostBytes, StorageAway, host_copies


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that a tensor lies across pieces, and several lie in one."""
    monkeypatch.setattr(host_bytes, "PIECE", 64)


def some_tensors():
    return [
        torch.arange(37, dtype=torch.float32),
        torch.arange(10.0, 35.0, dtype=torch.float64).view(5, 5),
        torch.tensor([1, 2, 3], dtype=torch.int8),
        torch.tensor(4.0).bfloat16(),
    ]


def test_storages_are_freed_and_come_back_with_their_bytes():
    tensors, expected = some_tensors(), some_tensors()
    view = tensors[0][3:9]
    away = StorageAway("cpu")
    for turn in range(3):
        away.leave(tensors)
        assert away.is_away
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 0, 0]
        away.come_back()
        assert not away.is_away
        assert view.tolist() == [value + turn for value in range(3, 9)]
        for tensor, before in zip(tensors, expected, strict=True):
            assert torch.equal(tensor, before)
            tensor += 1
            before += 1


def test_what_others_share_stays():
    whole = torch.arange(12.0)
    shard, own = whole[4:8], torch.ones(3)
    away = StorageAway("cpu")
    away.leave([shard, own], besides=[whole])
    assert whole.untyped_storage().nbytes() == 48
    assert own.untyped_storage().nbytes() == 0
    away.come_back()
    assert own.tolist() == [1, 1, 1]


def test_views_of_one_storage_leave_once():
    whole = torch.arange(12.0)
    away = StorageAway("cpu")
    away.leave([whole[:5], whole[5:]])
    assert whole.untyped_storage().nbytes() == 0
    away.come_back()
    assert whole.tolist() == list(range(12))


def test_host_memory_is_kept_for_the_next_time_and_grows_where_more_leaves():
    host = HostBytes("cpu")
    few, many = torch.arange(20.0), torch.arange(100.0)
    host.keep([few])
    host.keep([many])
    pieces = [piece.data_ptr() for piece in host._pieces]
    assert sum(map(len, host._pieces)) == 400
    host.keep([many + 1])
    assert [piece.data_ptr() for piece in host._pieces] == pieces
    host.give([many])
    assert many.tolist() == [value + 1 for value in range(100)]


def test_copies_are_apart_from_what_they_are_of():
    tensors = dict(zip("abcd", some_tensors(), strict=True)) | {"none": torch.zeros(0, 4)}
    copies = host_copies(tensors, "cpu")
    assert list(copies) == list(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    for name, expected in zip("abcd", some_tensors(), strict=True):
        assert torch.equal(copies[name], expected)
        assert copies[name].dtype == expected.dtype
    assert copies["none"].shape == (0, 4)
