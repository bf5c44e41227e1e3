"""Products of float32 by oneDNN: right, and chosen by processor and shape alone."""

import pytest
import torch

from megatron_rl.ops import products
from megatron_rl.ops.products import goes_to_onednn, least_here, product


@pytest.fixture
def faster(monkeypatch):
    """As on a processor where oneDNN is the faster one; its results are right on every one."""
    monkeypatch.setattr(products, "least_here", lambda: products.LEAST_PRODUCTS[26])


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
    assert goes_to_onednn(left, right)
    expected = left.double() @ right.double()
    found = product(left, right)
    assert found.dtype == torch.float32
    # The rounding of a sum of so many products of numbers of size 1.
    assert (found.double() - expected).abs().max() < 192 * 2e-6
    again = product(left.clone(), right)
    assert torch.equal(found, again)


def test_what_goes_elsewhere(faster):
    left, right = factors("forward")
    assert not goes_to_onednn(left.double(), right.double())
    assert not goes_to_onednn(left.bfloat16(), right.bfloat16())
    assert not goes_to_onednn(left[:4], right)  # too little
    assert not goes_to_onednn(left, right[::2][:, ::2].expand(48, 96))  # strides of its own
    assert not goes_to_onednn(left.clone().requires_grad_(), right)  # it would have no gradient
    with torch.no_grad():
        assert goes_to_onednn(left.clone().requires_grad_(), right)
    for dtype in (torch.float64, torch.float32):
        small = left[:4].to(dtype)
        assert torch.equal(product(small, right.to(dtype)), small @ right.to(dtype))
    memory = torch.empty(4, right.size(1))
    assert product(left[:4], right, memory).data_ptr() == memory.data_ptr()


def test_a_transposed_factor_is_looked_at_by_itself(monkeypatch):
    plain, transposed = factors("to the input"), factors("to the weight")
    for least, expected in (((1, products.NEVER), True), ((products.NEVER, 1), False)):
        monkeypatch.setattr(products, "least_here", lambda least=least: least)
        assert goes_to_onednn(*plain) is expected
        assert goes_to_onednn(*transposed) is not expected


AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("text", "capability", "expected"),
    [
        (AMD + "cpu family\t: 26\n", "AVX512", (1.5e6, 1.5e6)),
        (AMD + "cpu family\t: 27\n", "AVX512", (1.5e6, 1.5e6)),
        (AMD + "cpu family\t: 25\n", "AVX512", (12e6, products.NEVER)),
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
