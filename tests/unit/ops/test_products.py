"""Products of float32 matrices: right, and by a library that processor and shape choose alone."""

import pytest
import torch

from megatron_rl.ops import backend, native, products
from megatron_rl.ops.head import KEPT_BYTES, logits_memory
from megatron_rl.ops.products import Least, add_product, least_here, library_of, product

needs_native = pytest.mark.skipif(
    not native.BUILT or not native.has_wide_vectors(), reason="it is for native ops with AVX-512"
)
LIBRARIES = ["onednn", pytest.param("native", marks=needs_native)]


@pytest.fixture
def faster(request, monkeypatch):
    """As on a processor where that library is the fastest; its results are right on every one."""
    family = {"native": 25, "onednn": 26}[request.param]
    monkeypatch.setattr(products, "least_here", lambda: products.LEAST_PRODUCTS[family])
    monkeypatch.setattr(backend, "_chosen", "auto")
    return request.param


def factors(kind, rows=160, inner=96, columns=192):
    """As the three products of a layer have them: of [rows, inner] inputs and a weight."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(rows, inner, generator=draw)
    weight = torch.randn(columns, inner, generator=draw)
    grad = torch.randn(rows, columns, generator=draw)
    return {
        "forward": (x, weight.t()),
        "forward of [s, b, h]": (x.unflatten(0, (8, -1)), weight.t()),
        "to the input": (grad, weight),
        "to the weight": (grad.t(), x),
        "rows of a larger one": (torch.cat([x, x])[7:-7], weight.t()),
    }[kind]


@pytest.mark.parametrize("faster", LIBRARIES, indirect=True)
@pytest.mark.parametrize(
    "kind",
    [
        "forward",
        "forward of [s, b, h]",
        "to the input",
        "to the weight",
        "rows of a larger one",
    ],
)
def test_it_is_the_product(faster, kind):
    left, right = factors(kind)
    assert library_of(left, right) == faster
    expected = left.double() @ right.double()
    found = product(left, right)
    assert found.dtype == torch.float32
    # The rounding of a sum of so many products of numbers of size 1.
    assert (found.double() - expected).abs().max() < 192 * 2e-6
    again = product(left.clone(), right)
    assert torch.equal(found, again)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("inner", [1, 5, 16, 33, 768, 1700])
@pytest.mark.parametrize("columns", [1, 15, 16, 48, 50, 64, 129, 300])
def test_every_edge_of_the_native_product(inner, columns, threads):
    """Rows, columns and sums that do not fill tiles, vectors and blocks; either order of either."""
    draw = torch.Generator().manual_seed(inner + columns)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, 3, 8, 13, 97, 250):
            left = torch.randn(rows, inner, generator=draw)
            right = torch.randn(inner, columns, generator=draw)
            total = torch.randn(rows, columns, generator=draw)
            expected = left.double() @ right.double()
            seen = []
            for one in (left, left.t().contiguous().t()):
                for other in (right, right.t().contiguous().t()):
                    wide = torch.full((rows, columns + 3), torch.nan)
                    torch.ops.megatron_rl.multiply_(one, other, wide[:, :columns], False)
                    assert wide[:, columns:].isnan().all()
                    added = total.clone()
                    torch.ops.megatron_rl.multiply_(one, other, added, True)
                    close = {"atol": 4e-6 * inner**0.5 + 1e-6, "rtol": 1e-5}
                    torch.testing.assert_close(wide[:, :columns].double(), expected, **close)
                    torch.testing.assert_close(added.double(), expected + total, **close)
                    seen.append(wide[:, :columns])
            assert all(torch.equal(seen[0], one) for one in seen)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_a_row_has_the_same_bits_among_others():
    left, right = factors("forward", rows=200, inner=900)
    whole = torch.empty(200, 192)
    torch.ops.megatron_rl.multiply_(left, right, whole, False)
    for rows in (slice(0, 1), slice(5, 18), slice(100, 200)):
        alone = torch.empty(rows.stop - rows.start, 192)
        torch.ops.megatron_rl.multiply_(left[rows], right, alone, False)
        assert torch.equal(alone, whole[rows])


@needs_native
def test_what_the_native_product_refuses():
    left, right, out = torch.randn(4, 6), torch.randn(6, 5), torch.empty(4, 5)
    for arguments, name in (
        ((left.double(), right, out), "left: expected float32"),
        ((left, right[:5], out), "right: expected as many rows as left has columns"),
        ((left, right, out[:3]), "out: expected shape"),
        ((left, right, out.double()), "out: expected float32"),
        ((left, right, torch.empty(5, 4).t()), "out: expected columns of stride 1"),
        ((torch.randn(8, 12)[::2, ::2], right, out), "left: expected rows or columns of stride 1"),
        ((left[:, :0], right[:0], out), "left: expected at least one column"),
    ):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.megatron_rl.multiply_(*arguments, False)
    torch.ops.megatron_rl.multiply_(left[:0], right, out[:0], False)


@pytest.mark.parametrize("faster", LIBRARIES, indirect=True)
def test_a_result_is_put_where_memory_is_or_added(faster, monkeypatch):
    left, right = factors("forward")
    memory = torch.full((160, 192), torch.nan)
    monkeypatch.setattr(products, "LARGE_BYTES", memory.nbytes)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 160 * 70)  # three blocks of columns
    assert product(left, right, memory).data_ptr() == memory.data_ptr()
    expected = left.double() @ right.double()
    assert (memory - expected).abs().max() < 192 * 2e-6
    add_product(memory, left, right)
    assert (memory - 2 * expected).abs().max() < 192 * 4e-6
    add_product(memory, left, right, overwrites=True)
    assert (memory - expected).abs().max() < 192 * 2e-6


@pytest.mark.parametrize("faster", LIBRARIES, indirect=True)
def test_what_goes_elsewhere(faster):
    left, right = factors("forward")
    assert library_of(left.double(), right.double()) == "torch"
    assert library_of(left.bfloat16(), right.bfloat16()) == "torch"
    assert library_of(left[:4], right) == "torch"  # too little
    strided = right[::2][:, ::2].expand(48, 96)
    assert library_of(left[:, :48].contiguous(), strided) == "torch"
    assert library_of(left.clone().requires_grad_(), right) == "torch"  # it would have no gradient
    with torch.no_grad():
        assert library_of(left.clone().requires_grad_(), right) == faster
    for dtype in (torch.float64, torch.float32):
        small = left[:4].to(dtype)
        assert torch.equal(product(small, right.to(dtype)), small @ right.to(dtype))
    memory = torch.empty(4, right.size(1))
    assert product(left[:4], right, memory).data_ptr() == memory.data_ptr()


@needs_native
def test_definitions_alone_take_no_native_product(monkeypatch):
    monkeypatch.setattr(products, "least_here", lambda: products.LEAST_PRODUCTS[25])
    monkeypatch.setattr(backend, "_chosen", "reference")
    assert library_of(*factors("forward")) == "torch"


def test_a_transposed_factor_is_looked_at_by_itself(monkeypatch):
    plain, transposed = factors("to the input"), factors("to the weight")
    for least, expected in (
        (Least(products.NEVER, 1, products.NEVER), ("onednn", "torch")),
        (Least(products.NEVER, products.NEVER, 1), ("torch", "onednn")),
    ):
        monkeypatch.setattr(products, "least_here", lambda least=least: least)
        assert (library_of(*plain), library_of(*transposed)) == expected


AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("text", "capability", "expected"),
    [
        (AMD + "cpu family\t: 26\n", "AVX512", products.LEAST_PRODUCTS[26]),
        (AMD + "cpu family\t: 27\n", "AVX512", products.LEAST_PRODUCTS[26]),
        (AMD + "cpu family\t: 25\n", "AVX512", products.LEAST_PRODUCTS[25]),
        (AMD + "cpu family\t: 25\n", "AVX2", products.NOWHERE),
        (AMD + "cpu family\t: 23\n", "AVX2", products.NOWHERE),
        (INTEL + "cpu family\t: 6\n", "AVX512", products.NOWHERE),
        ("CPU implementer\t: 0x41\n", "AVX512", products.NOWHERE),
        (None, "AVX512", products.NOWHERE),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, text, capability, expected):
    if not torch.backends.mkldnn.is_available():
        expected = products.NOWHERE
    file = tmp_path / "cpuinfo"
    if text is not None:
        file.write_text("processor : 0\n" + text)
    told = products._processor(file)
    monkeypatch.setattr(products, "_processor", lambda: told)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    least_here.cache_clear()
    try:
        assert least_here() == expected
    finally:
        least_here.cache_clear()


def test_memory_of_logits_is_kept_on_a_cpu():
    like = torch.empty(0)
    with logits_memory(3, 5, like) as memory:
        first = memory.data_ptr()
        assert memory.shape == (3, 5)
        assert memory.dtype == torch.float32
        with logits_memory(3, 5, like) as other:  # lent, so another one
            assert other.data_ptr() != first
            kept = other.data_ptr()
    with logits_memory(3, 2, like.double()) as again:
        assert again.dtype == torch.float64
        assert again.shape == (3, 2)
        assert again.data_ptr() in (first, kept)
    with logits_memory(300, 50, like) as more:
        larger = more.data_ptr()
    with logits_memory(3, 5, like) as less:
        assert less.data_ptr() == larger
    with logits_memory(1, KEPT_BYTES, like) as large:  # four bytes each
        assert large.shape == (1, KEPT_BYTES)


def test_memory_comes_back_after_an_error():
    with logits_memory(3, 5, torch.empty(0)) as memory:
        first = memory.data_ptr()
    with pytest.raises(ValueError, match="within"), logits_memory(3, 5, torch.empty(0)):
        raise ValueError("within")
    with logits_memory(3, 5, torch.empty(0)) as memory:
        assert memory.data_ptr() == first
