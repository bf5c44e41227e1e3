"""Norm, SwiGLU, rope and the attention of next tokens against float64; both ways of each."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rl.ops import fused_layers, native
from megatron_rl.ops.fused_layers import attend_next, rms_norm, swiglu, swiglu_backward, turn

ROUNDING = 2e-6  # of float32 sums of up to some hundred terms, by the largest result
OF_DRAWING = str(Path(__file__).with_name("test_draw_from_head.py"))
ISAS = {"avx512": {"avx512f", "avx512bw"}, "avx2": {"avx2", "fma"}, "baseline": set()}


def close(found, expected, scale=None):
    scale = expected.abs().max().item() if scale is None else scale
    torch.testing.assert_close(found.double(), expected, atol=ROUNDING * scale, rtol=0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


@pytest.mark.parametrize("size", [1, 15, 16, 33, 576])
@pytest.mark.parametrize("rows", [(), (1,), (300, 1), (2, 3, 5)])
def test_norm_and_its_gradients(rows, size):
    x, weight, grad = draw(*rows, size), draw(size, seed=1), draw(*rows, size, seed=2)
    given, of_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    normed = rms_norm(given, of_weight, 1e-5)
    normed.backward(grad)
    x, weight, grad = x.double(), weight.double(), grad.double()
    inverse = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    close(normed.detach(), x * inverse * weight)
    # d/dx of x r w with r = (mean x^2 + eps)^(-1/2): the mean takes its share of every entry.
    along = (grad * weight * x).mean(-1, keepdim=True)
    torch.testing.assert_close(
        given.grad.double(),
        inverse * (grad * weight - x * inverse**2 * along),
        atol=1e-5,
        rtol=1e-5,
    )
    terms = (grad * x * inverse).reshape(-1, size)
    close(of_weight.grad, terms.sum(0), scale=terms.abs().sum(0).max().item())


def test_norm_of_a_view_is_that_of_its_copy():
    view, weight = draw(7, 3, 24)[:, 1:, :].transpose(0, 1), draw(24)
    assert torch.equal(rms_norm(view, weight, 1e-6), rms_norm(view.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("size", [1, 16, 37, 256])
def test_swiglu_and_its_gradient(size):
    x, grad = 5 * draw(9, 1, 2 * size), draw(9, 1, size, seed=1)
    wide = x.double().requires_grad_()
    gate, through = wide.split(size, dim=-1)
    expected = gate / (1 + torch.exp(-gate)) * through
    expected.backward(grad.double())
    close(swiglu(x), expected.detach())
    close(swiglu_backward(grad, x), wide.grad)


def test_gates_far_from_zero_are_open_or_shut():
    x = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4] + [1.0] * 7])
    shut_or_open = torch.tensor([[0.0, 0.0, 0.0, 0.0, 88.0, 200.0, 1e4]])
    torch.testing.assert_close(swiglu(x), shut_or_open, atol=1e-30, rtol=1e-6)
    slopes = swiglu_backward(torch.ones(1, 7), x)[:, :7]
    torch.testing.assert_close(
        slopes, torch.tensor([[0.0, 0, 0, 0.5, 1, 1, 1]]), atol=1e-30, rtol=0
    )


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 20), (2, 32), (5, 64)])
@pytest.mark.parametrize("sign", [1, -1])
def test_rope_turns_pairs_of_the_halves(heads, size, sign):
    angles = draw(6, 1, size // 2, seed=1)
    x = draw(6, heads, 2 * size)[..., :size]  # heads of a longer row, as those of a product are
    turned = turn(x, angles.cos(), angles.sin(), sign)
    pairs = torch.complex(*x.double().unflatten(-1, (2, -1)).unbind(-2))
    expected = pairs * torch.exp(1j * sign * angles.double())
    close(turned, torch.cat([expected.real, expected.imag], dim=-1))
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)  # each product and each sum is rounded
    rounded = first * angles.cos() - sign * (second * angles.sin())
    assert torch.equal(turned[..., : size // 2], rounded)


CASES = [  # rows, heads, groups, size, tokens, window
    (1, 1, 1, 1, 1, None),
    (5, 4, 2, 24, 40, None),
    (5, 4, 2, 24, 40, 7),
    (3, 3, 3, 33, 70, 1),
    (8, 9, 3, 64, 300, None),
    (8, 9, 3, 64, 300, 128),
]


def problem_of(rows, heads, groups, size, tokens):
    cache = (
        draw(rows + 2, groups, tokens, size, seed=1),
        draw(rows + 2, groups, tokens, size, seed=2),
    )
    own = (
        draw(rows, heads, size),
        draw(rows, groups, size, seed=3),
        draw(rows, groups, size, seed=4),
    )
    places = torch.randint(tokens, (rows,), generator=torch.Generator().manual_seed(rows))
    return own, cache, places


@pytest.mark.parametrize(("rows", "heads", "groups", "size", "tokens", "window"), CASES)
def test_a_next_token_sees_what_is_kept_up_to_it(
    native_only, rows, heads, groups, size, tokens, window
):
    (query, key, value), (keys, values), places = problem_of(rows, heads, groups, size, tokens)
    kept = keys.clone(), values.clone()
    out = attend_next(query, key, value, kept, places, scale=0.3, window=window)
    for row, place in enumerate(places.tolist()):
        keys[row, :, place], values[row, :, place] = key[row], value[row]
        first = 0 if window is None else max(0, place + 1 - window)
        for head in range(heads):
            seen = row, head // (heads // groups), slice(first, place + 1)
            shares = (0.3 * (keys[seen].double() @ query[row, head].double())).softmax(0)
            close(out[row].unflatten(0, (heads, -1))[head], shares @ values[seen].double())
    assert torch.equal(kept[0], keys)
    assert torch.equal(kept[1], values)


def test_large_scores_have_a_softmax(native_only):
    own, cache, places = problem_of(2, 1, 1, 16, 20)
    out = attend_next(1e4 * own[0], *own[1:], cache, places, scale=1.0, window=None)
    assert out.isfinite().all()


def test_a_row_alone_is_what_it_is_among_others(native_only):
    """On any number of threads."""
    own, cache, places = problem_of(40, 8, 2, 64, 200)
    x, grad, weight = draw(1000, 128), draw(1000, 128, seed=1), draw(128)
    wide = draw(1000, 256)

    def all_rows():
        of_norm = x.clone().requires_grad_(), weight.clone().requires_grad_()
        rms_norm(*of_norm, 1e-6).backward(grad)
        return (
            rms_norm(x, weight, 1e-6),
            of_norm[0].grad,
            swiglu(wide),
            swiglu_backward(grad, wide),
            attend_next(*own, [part.clone() for part in cache], places, scale=None, window=None),
            of_norm[1].grad,
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = all_rows()
        torch.set_num_threads(1)
        for one, other in zip(found, all_rows(), strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(rms_norm(x[7:8], weight, 1e-6), found[0][7:8])
    assert torch.equal(swiglu(wide[7:8]), found[2][7:8])
    assert torch.equal(swiglu_backward(grad[7:8], wide[7:8]), found[3][7:8])
    first = [part[:1] for part in own]
    alone = attend_next(
        *first, [part.clone() for part in cache], places[:1], scale=None, window=None
    )
    assert torch.equal(alone, found[4][:1])


def test_both_ways_turn_to_the_same_bits(ops_backend, monkeypatch):
    x, angles = draw(50, 3, 40), draw(50, 1, 20, seed=1)
    found = turn(x, angles.cos(), angles.sin(), 1)
    monkeypatch.setattr(fused_layers, "run_natively", lambda *_: False)
    assert torch.equal(turn(x, angles.cos(), angles.sin(), 1), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_run_their_definitions(dtype):
    x, weight = draw(4, 1, 32).to(dtype), draw(32).to(dtype)
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    rounded = {"atol": 0, "rtol": 2**-7 if dtype == torch.bfloat16 else 1e-12}
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), normed, **rounded)
    gate, through = wide.chunk(2, -1)
    expected = gate * gate.sigmoid() * through
    torch.testing.assert_close(swiglu(x).double(), expected, atol=0, rtol=rounded["rtol"])
    assert swiglu_backward(x[..., :16], x).dtype == dtype


def test_a_place_outside_the_cache_is_refused_before_anything_is_kept(native_only):
    own, cache, places = problem_of(3, 2, 2, 8, 10)
    before = [part.clone() for part in cache]
    for wrong in (10, -1):
        places[2] = wrong
        with pytest.raises(RuntimeError, match=f"positions: expected 0 up to 9, got {wrong}"):
            attend_next(*own, cache, places, scale=None, window=None)
    for part, kept in zip(cache, before, strict=True):
        assert torch.equal(part, kept)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ops: ops.swiglu(torch.ones(2, 3)),
            r"x: expected an even last dimension, got shape",
        ),
        (lambda ops: ops.swiglu(torch.ones(2, 4).double()), r"x: expected float32, got float64"),
        (
            lambda ops: ops.rms_norm(torch.ones(2, 4), torch.ones(3), 1e-6),
            r"weight: expected shape \[4\], got shape \[3\]",
        ),
        (
            lambda ops: ops.turn(torch.ones(2, 1, 4), torch.ones(2, 1, 1), torch.ones(2, 1, 2), 1),
            r"cos: expected shape \[2, 1, 2\], got shape \[2, 1, 1\]",
        ),
        (
            lambda ops: ops.attend_next_(
                *[torch.ones(2, 3, 4), *[torch.ones(2, 2, 4)] * 2],
                *[torch.ones(2, 2, 5, 4)] * 2,
                *[torch.zeros(2, dtype=torch.int64), 1.0, 0],
            ),
            r"query: expected a multiple of the key's heads, got 3",
        ),
        (
            lambda ops: ops.attend_next_(
                *[torch.ones(2, 2, 4)] * 3,
                *[torch.ones(1, 2, 5, 4)] * 2,
                *[torch.zeros(2, dtype=torch.int64), 1.0, 0],
            ),
            r"keys: expected shape \[at least as many slots",
        ),
    ],
)
def test_what_an_op_does_not_take_is_said(native_only, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.megatron_rl)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_right(native_only, isa):
    """These very tests once more, and those of drawing, in a process that is told which to use."""
    if not ISAS[isa] <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this processor has no {isa}")
    if os.environ.get("MEGATRON_RL_CPU_ISA"):
        pytest.skip("it is told already")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            OF_DRAWING,
        ],
        env=os.environ | {"MEGATRON_RL_CPU_ISA": isa, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_ops_that_are_missing_are_noticed():
    assert set(native.LAYER_OPS) <= set(dir(torch.ops.megatron_rl)) or native.FAULT
