"""Products of float32 by oneDNN: right, and chosen by processor and shape alone."""

import pytest
import torch

from megatron_rl.ops import products
from megatron_rl.ops.products import goes_to_onednn, is_faster_here, product


@pytest.fixture
def faster(monkeypatch):
    """As on a processor where oneDNN is the faster one; its results are right on every one."""
    monkeypatch.setattr(products, "is_faster_here", lambda: True)


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


def test_the_processor_decides(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    for text, maker in (
        ("processor : 0\nvendor_id\t: AuthenticAMD\n", "AuthenticAMD"),
        ("vendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("CPU implementer\t: 0x41\n", ""),
    ):
        file.write_text(text)
        assert products._maker(file) == maker
    assert products._maker(tmp_path / "nothing") == ""
    for maker, capability, expected in (
        ("AuthenticAMD", "AVX512", torch.backends.mkldnn.is_available()),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ):
        monkeypatch.setattr(products, "_maker", lambda maker=maker: maker)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda c=capability: c)
        is_faster_here.cache_clear()
        assert is_faster_here() is expected
    is_faster_here.cache_clear()
