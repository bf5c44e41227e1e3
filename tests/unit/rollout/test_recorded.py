"""What is repeated from a recording is what the function would have done, to the bit."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from megatron_rl.rollout import recorded
from megatron_rl.rollout.recorded import Recordings

KEPT = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *inputs):
        self.calls += 1
        return self.function(*inputs)


def with_views(x, y):
    upper, lower = (x @ KEPT.t()).chunk(2, dim=1)
    return torch.cat([F.silu(upper) * lower, y[:, None, :1].flatten(1)], dim=1)


def with_lists(x, y):
    places = torch.arange(4, device="cpu")
    out = x.clone()
    out[places, places] = y[:, 0]
    return torch.stack([out, x], dim=0).index_select(0, places[:2])


def with_masks(x, y):
    mask = torch.zeros(4, 5)
    mask.masked_fill_(x > y, -torch.inf)  # must begin with zeros every time
    return mask + torch.ones(5).cumsum(0)


def with_results_given(x, y):
    out = torch.empty(4, 5)
    torch.mul(x, y, out=out)
    return out.add_(y, alpha=-2).sub(torch.addcmul(x, x, y, value=0.5))


def with_attention(x, y):
    heads = (x[None, None], y[None, None], y[None, None])
    out = F.scaled_dot_product_attention(*heads, attn_mask=torch.zeros(4, 4))[0, 0]
    return F.rms_norm(F.dropout(out, 0.5, training=False), (5,), KEPT[0])


def with_whole_numbers(x, y):
    assert torch.promote_types(x.dtype, torch.float64) == torch.float64  # of no tensor
    return (x > 0).sum(dim=1).long().where(y[:, 0] > 0, -1)


def with_calls_that_change_nothing(x, y):
    made = x.clone()
    same = made.to(torch.float32)[:4].view_as(x).reshape(4, 5)
    same.contiguous().add_(y)
    return same.expand(4, 5).detach() + made[1:].sum()


def an_input(x, y):
    return y


def an_input_as_it_is(x, y):
    return y.to(y.dtype).view_as(x)


@pytest.mark.parametrize(
    "function",
    [
        with_views,
        with_lists,
        with_masks,
        with_results_given,
        with_attention,
        with_whole_numbers,
        with_calls_that_change_nothing,
        an_input,
        an_input_as_it_is,
    ],
)
def test_a_repeat_is_what_the_function_does(function):
    recordings, counted = Recordings(), Counted(function)
    draw = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        for _ in range(6):
            inputs = torch.randn(4, 5, generator=draw), torch.randn(4, 5, generator=draw)
            assert torch.equal(recordings.run("key", counted, *inputs), function(*inputs))
    assert counted.calls == 2  # once as it is, and once to record it


def test_calls_that_change_nothing_are_not_repeated():
    recorder, inputs = recorded._Recorder(), (torch.ones(4, 5), torch.ones(4, 5))
    with torch.inference_mode(), recorder:
        with_calls_that_change_nothing(*inputs)
    repeated = [call.operation.overloadpacket.__name__ for call in recorder.calls]
    assert repeated == ["clone", "add_", "slice", "sum", "add"]


def test_what_stays_where_it_is_is_read_and_written_as_it_is_by_then():
    weight, cache = torch.randn(5), torch.zeros(3, 8)

    def step(place, value):
        cache[:, place] = value[:, None]
        seen = cache[:, :6]
        return seen.sum(dim=1) * (1 + weight)[:3]

    recordings, counted = Recordings(), Counted(step)
    with torch.inference_mode():
        for number in range(6):
            weight.mul_(1.5)
            value, place = torch.randn(3), torch.tensor([number])
            before = cache.clone()
            found = recordings.run(0, counted, place, value)
            before[:, number] = value
            assert torch.equal(cache, before)
            assert torch.equal(found, before[:, :6].sum(dim=1) * (1 + weight)[:3])
    assert counted.calls == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if bool(x.sum() > 0) else x,
        lambda x: x[: int(x.argmax()) + 1],
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: x + torch.randn(5),
    ],
)
def test_what_might_do_something_else_is_never_repeated(function):
    recordings, counted = Recordings(), Counted(function)
    with torch.inference_mode():
        for number in range(5):
            recordings.run(0, counted, torch.randn(5))
            assert counted.calls == number + 1


def test_keys_are_apart():
    recordings = Recordings()
    for _ in range(4):
        for factor in (2, 3):
            found = recordings.run(factor, lambda x, factor=factor: x * factor, torch.ones(2))
            assert found.tolist() == [factor, factor]


def test_results_are_gone_when_nobody_has_them():
    seen = []

    def step(x):
        between = x * 2
        return between + 1

    recordings = Recordings()
    for _ in range(4):
        given = torch.randn(3)
        found = recordings.run(0, step, given)
        seen += [weakref.ref(given), weakref.ref(found)]
    del given, found
    assert [one() for one in seen[4:]] == [None] * 4


def test_recordings_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr(recorded, "MOST_RECORDINGS", 3)
    recordings = Recordings()
    for key in range(10):
        for _ in range(3):
            assert recordings.run(key, lambda x, key=key: x + key, torch.zeros(1)).item() == key
        assert len(recordings._repeats) <= 3
