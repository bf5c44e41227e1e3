"""The compiled row ops against float64, by name: shapes, dtypes, masks, errors."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("native_only")
ops = torch.ops.megatron_rl

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Results are float32 (float64 of float64): sums of e^z that are good to 1e-6, logs of up to 12.
TOLERANCE = {torch.float64: 1e-12}
# Half a step of the type the gradient is rounded to, relative, and what float32 adds to it.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 3e-5}
# A vocabulary of 1, of odd sizes around vectors of 16 and blocks of 1024, and Qwen's.
VOCABS = [1, 2, 15, 16, 17, 31, 1023, 1024, 1025, 4099, 151936]


def problem(rows, vocab, dtype, *, stride_pad=0):
    torch.manual_seed(vocab)
    logits = (torch.randn(rows, vocab + stride_pad) * 5).to(dtype)[:, :vocab]
    targets = torch.randint(0, vocab, (rows,))
    return logits, targets


def exact(logits, targets, inv_temp):
    log_p = (logits.double() * inv_temp).log_softmax(-1)
    logprobs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    return logprobs, entropy, log_p


def measured(logits, targets, inv_temp=1.0, *, vocab_start=0, valid_vocab=None, weights=None):
    valid_vocab = vocab_start + logits.size(1) if valid_vocab is None else valid_vocab
    stats = ops.row_stats(logits, targets, weights, vocab_start, valid_vocab, inv_temp, True)
    return ops.merge_stats(stats[None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_and_entropy_equal_float64(vocab, dtype):
    logits, targets = problem(3, vocab, dtype, stride_pad=5)  # rows that start anywhere
    logprobs, entropy, lse = measured(logits, targets, 1 / 0.6)
    exact_logprobs, exact_entropy, _ = exact(logits, targets, 1 / 0.6)
    close = {"atol": TOLERANCE.get(dtype, 1e-5), "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(logprobs, exact_logprobs, **close)
    torch.testing.assert_close(entropy, exact_entropy, **close)
    expected_lse = (logits.double() / 0.6).logsumexp(-1)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient_is_rounded_once(vocab, dtype, with_entropy):
    logits, targets = problem(3, vocab, dtype, stride_pad=3)
    logprobs_grad = torch.tensor([1.0, -0.3, 2.0])
    entropy_grad = torch.tensor([0.5, -1.0, 0.2]) * with_entropy
    _, entropy, lse = measured(logits, targets, 1.25)
    c, a = 1.25 * logprobs_grad.to(lse), 1.25 * entropy_grad.to(lse)
    params = torch.stack([lse, c, a, -(c + a * entropy)], dim=1)
    gradient = ops.dlogits(logits, targets, params, None, 0, vocab, 1.25)

    leaf = logits.double().requires_grad_()
    exact_logprobs, exact_entropy, _ = exact(leaf, targets, 1.25)
    (exact_logprobs @ logprobs_grad.double() + exact_entropy @ entropy_grad.double()).backward()
    assert gradient.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(gradient, leaf.grad, atol=1e-13, rtol=1e-11)
        return
    floor = 2e-6  # what float32 leaves of numbers near 2 that cancel
    torch.testing.assert_close(
        gradient.double(), leaf.grad, atol=floor, rtol=1.05 * ROUNDING[dtype]
    )
    best = (leaf.grad.to(dtype).double() - leaf.grad).norm()
    assert (gradient.double() - leaf.grad).norm() <= 1.05 * best + 3 * floor


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_has_the_bits_of_out_of_place(dtype):
    logits, targets = problem(4, 1000, dtype)
    params = torch.randn(4, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    params[:, 0] += 10
    expected = ops.dlogits(logits, targets, params, None, 0, 990, 1.0)
    ops.dlogits_(logits, targets, params, None, 0, 990, 1.0)
    assert torch.equal(logits, expected)
    assert (expected[:, 990:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_weight_are_not_read_and_have_no_gradient(dtype):
    logits, targets = problem(3, 100, dtype)
    logits[1] = math.nan
    targets[1] = -100
    weights = torch.tensor([1.0, 0.0, 1.0]).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    logprobs, entropy, lse = measured(logits, targets, weights=weights)
    assert logprobs[1] == entropy[1] == 0
    params = torch.zeros(3, 4, dtype=lse.dtype)
    params[:, 0] = lse
    ops.dlogits_(logits, targets, params, None, 0, 100, 1.0)
    assert (logits == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_and_padded_logits_count_for_nothing(dtype):
    logits, targets = problem(2, 40, dtype)
    logits[0, 5:37] = -math.inf
    logits[:, 38:] = 6e4
    targets[:] = 2
    logprobs, entropy, lse = measured(logits, targets, valid_vocab=38)
    exact_logprobs, exact_entropy, _ = exact(logits[:, :38], targets, 1.0)
    torch.testing.assert_close(logprobs.double(), exact_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=1e-5, rtol=0)
    params = torch.stack([lse, 1 + 0 * lse, 1 + 0 * lse, -1 - entropy], dim=1)
    gradient = ops.dlogits(logits, targets, params, None, 0, 38, 1.0)
    assert (gradient[0, 5:37] == 0).all()
    assert (gradient[:, 38:] == 0).all()
    assert gradient.isfinite().all()


def test_nan_logits_are_not_hidden():
    logits, targets = problem(1, 100, torch.float32)
    logits[0, 50] = math.nan
    logprobs, entropy, _ = measured(logits, targets)
    assert logprobs.isnan().all()
    assert entropy.isnan().all()


def test_a_target_that_is_no_token_has_no_probability():
    logprobs, _, _ = measured(torch.zeros(3, 4), torch.tensor([-1, 3, 4]), valid_vocab=3)
    assert logprobs.tolist() == [-math.inf] * 3


def test_no_rows():
    logits = torch.zeros(0, 8, dtype=torch.bfloat16)
    targets = torch.zeros(0, dtype=torch.long)
    assert ops.row_stats(logits, targets, None, 0, 8, 1.0, True).shape == (0, 4)
    assert ops.dlogits(logits, targets, torch.zeros(0, 4), None, 0, 8, 1.0).shape == (0, 8)


def test_more_rows_than_a_grid_dimension_of_two_bytes():
    logits, targets = problem(70_001, 33, torch.bfloat16)
    logprobs, _, _ = measured(logits, targets)
    expected, _, _ = exact(logits[-5:], targets[-5:], 1.0)
    torch.testing.assert_close(logprobs[-5:].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_offsets_beyond_31_bits():
    # 15,000 rows apart by 151,936: the last one starts past 2^31 elements; only it is touched.
    rows, vocab = 15_000, 151_936
    storage = torch.empty(rows * vocab, dtype=torch.bfloat16)  # pages that are not touched cost 0
    logits = storage.view(rows, vocab)
    targets = torch.zeros(rows, dtype=torch.long)
    weights = torch.zeros(rows)
    weights[-1] = 1.0
    logits[-1] = torch.randn(vocab)
    logprobs, _, lse = measured(logits, targets, weights=weights)
    expected, _, log_p = exact(logits[-1:], targets[-1:], 1.0)
    torch.testing.assert_close(logprobs[-1:].double(), expected, atol=1e-5, rtol=0)
    params = torch.stack([lse, weights, 0 * lse, -weights], dim=1)[-2:].contiguous()
    ops.dlogits_(logits[-2:], targets[-2:], params, None, 0, vocab, 1.0)
    gradient = -log_p.exp()
    gradient[0, 0] += 1
    torch.testing.assert_close(logits[-1:].double(), gradient, atol=1e-9, rtol=2.0**-8)


def test_results_repeat_bit_for_bit_whatever_the_batch_and_the_threads():
    logits, targets = problem(13, 4099, torch.bfloat16)
    whole = ops.row_stats(logits, targets, None, 0, 4099, 0.9, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.row_stats(logits, targets, None, 0, 4099, 0.9, True), whole)
    finally:
        torch.set_num_threads(threads)
    for start, end in ((0, 1), (1, 6), (6, 13)):
        part = ops.row_stats(logits[start:end], targets[start:end], None, 0, 4099, 0.9, True)
        assert torch.equal(part, whole[start:end])


def has_instructions(isa):
    """As the kernel tells it, which is not what the library asks."""
    needed = {"avx512": {"avx512f", "avx512bw"}, "avx2": {"avx2", "fma"}}.get(
        isa, {isa} - {"baseline"}
    )
    return needed <= set(Path("/proc/cpuinfo").read_text().split())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline", "sse9"])
def test_every_instruction_set_gives_the_same_answer(isa, tmp_path):
    logits, targets = problem(4, 1029, torch.bfloat16)
    inputs, outputs = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save([(logits.to(dtype), targets) for dtype in DTYPES[:3]], inputs)
    script = f"""
import torch, megatron_rl._C
ops, results = torch.ops.megatron_rl, []
for logits, targets in torch.load({str(inputs)!r}):
    stats = ops.row_stats(logits, targets, None, 0, 1027, 1.5, True)
    _, entropy, lse = ops.merge_stats(stats[None])
    params = torch.stack([lse, 1 + 0 * lse, 0.5 + 0 * lse, -1 - 0.5 * entropy], dim=1)
    results.append((stats, ops.dlogits(logits, targets, params, None, 0, 1027, 1.5)))
torch.save(results, {str(outputs)!r})
"""
    environment = os.environ | {"MEGATRON_RL_CPU_ISA": isa}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    if not has_instructions(isa):
        assert f"MEGATRON_RL_CPU_ISA={isa}: this processor has no such" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    for dtype, (stats, gradient) in zip(DTYPES[:3], torch.load(outputs), strict=True):
        expected = ops.row_stats(logits.to(dtype), targets, None, 0, 1027, 1.5, True)
        torch.testing.assert_close(stats, expected, atol=1e-5, rtol=2e-6)
        _, entropy, lse = ops.merge_stats(expected[None])
        params = torch.stack([lse, 1 + 0 * lse, 0.5 + 0 * lse, -1 - 0.5 * entropy], dim=1)
        expected = ops.dlogits(logits.to(dtype), targets, params, None, 0, 1027, 1.5)
        torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=ROUNDING[dtype])


def test_every_half_precision_number_survives():
    # a row of one column, the target: with a = b = 0 its gradient is c, narrowed
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = numbers[numbers.isfinite()]
        params = torch.zeros(len(numbers), 4)
        params[:, 1] = numbers.float()
        logits = torch.zeros(len(numbers), 1, dtype=dtype)
        targets = torch.zeros(len(numbers), dtype=torch.long)
        gradient = ops.dlogits(logits, targets, params, None, 0, 1, 1.0)[:, 0]
        assert torch.equal(gradient, numbers)
        read = ops.row_stats(numbers[:, None].contiguous(), targets, None, 0, 1, 1.0, False)
        assert torch.equal(read[:, 3], numbers.float())


def test_narrowing_ties_go_to_even_and_overflow_to_infinity():
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, -3.4e38, 1e-45, 65519.0, 65520.0])
    values = torch.cat([values, torch.randn(10_000) * 1e-6, torch.randn(10_000)])
    for dtype in (torch.bfloat16, torch.float16):
        params = torch.zeros(len(values), 4)
        params[:, 1] = values
        logits = torch.zeros(len(values), 1, dtype=dtype)
        targets = torch.zeros(len(values), dtype=torch.long)
        gradient = ops.dlogits(logits, targets, params, None, 0, 1, 1.0)[:, 0]
        assert torch.equal(gradient, values.to(dtype))


def test_rescale_if_touches_nothing_where_the_factor_is_expected():
    x = torch.randn(1000).to(torch.bfloat16)
    same, double = x.clone(), x.clone()
    ops.rescale_if_(same, torch.tensor(0.5), 0.5)
    ops.rescale_if_(double, torch.tensor(1.0), 0.5)
    assert torch.equal(same, x)
    assert torch.equal(double, x * 2)


T2, F4 = torch.zeros(2, dtype=torch.long), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.row_stats(torch.zeros(2), T2, None, 0, 4, 1.0, True),
            r"row_stats: logits: expected shape \[T, V\], got shape \[2\]",
        ),
        (
            lambda: ops.row_stats(F4, T2[:1], None, 0, 4, 1.0, True),
            r"row_stats: targets: expected shape \[2\], got shape \[1\]",
        ),
        (
            lambda: ops.row_stats(F4, T2.int(), None, 0, 4, 1.0, True),
            "row_stats: targets: expected int64, got int32",
        ),
        (
            lambda: ops.row_stats(F4.long(), T2, None, 0, 4, 1.0, True),
            "row_stats: logits: expected bfloat16, float16, float32 or float64, got int64",
        ),
        (
            lambda: ops.row_stats(torch.zeros(4, 2).T, T2, None, 0, 4, 1.0, True),
            r"row_stats: logits: expected columns of stride 1, got strides \[1, 2\]",
        ),
        (
            lambda: ops.row_stats(F4, T2 + 7, torch.ones(2), 0, 4, 1.0, True),
            r"row_stats: targets: expected ids in \[0, 4\) where weights are not 0, got 7 in row 0",
        ),
        (
            lambda: ops.row_stats(F4, T2, None, 0, 4, -1.0, True),
            "row_stats: inv_temp: expected a positive number, got -1",
        ),
        (
            lambda: ops.dlogits_(F4[:1].expand(2, 4), T2, F4, None, 0, 4, 1.0),
            r"dlogits_: logits: expected rows that do not overlap, got strides \[0, 1\]",
        ),
        (
            lambda: ops.dlogits(F4, T2, torch.zeros(2, 3), None, 0, 4, 1.0),
            r"dlogits: params: expected shape \[2, 4\], got shape \[2, 3\]",
        ),
        (
            lambda: ops.dlogits(F4, T2, F4, torch.ones(1), 0, 4, 1.0),
            r"dlogits: grad_scale: expected shape \[\], got shape \[1\]",
        ),
        (
            lambda: ops.merge_stats(torch.zeros(2, 4)),
            r"merge_stats: stats: expected shape \[shards, T, 4\], got shape \[2, 4\]",
        ),
        (
            lambda: ops.rescale_if_(F4, torch.ones((), dtype=torch.float64), 1.0),
            "rescale_if_: grad: expected float32, got float64",
        ),
    ],
)
def test_an_error_names_argument_expected_and_actual(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_schemas_and_fakes_agree_with_the_ops():
    logits, targets = problem(3, 17, torch.float32)
    params = torch.randn(3, 4)
    torch.library.opcheck(ops.row_stats, (logits, targets, torch.ones(3), 0, 17, 1.0, True))
    torch.library.opcheck(ops.merge_stats, (torch.rand(2, 3, 4),))
    torch.library.opcheck(ops.dlogits, (logits, targets, params, torch.tensor(2.0), 0, 17, 1.0))
    torch.library.opcheck(ops.dlogits_, (logits.clone(), targets, params, None, 0, 17, 1.0))
    torch.library.opcheck(ops.rescale_if_, (logits.clone(), torch.tensor(2.0), 1.0))
