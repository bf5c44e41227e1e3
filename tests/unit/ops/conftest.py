import pytest
import torch

from megatron_rl.ops import backend, native

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=["reference", "native"])
def ops_backend(request):
    """Every test of an op holds for its definition and for the compiled op."""
    if request.param == "native" and not native.BUILT:
        pytest.skip(f"no native ops: {native.FAULT}")
    backend.choose(request.param, CPU)
    yield request.param
    backend.choose("auto", CPU)


@pytest.fixture
def native_only(ops_backend):
    """For tests that call the compiled ops by name: once is enough."""
    if ops_backend != "native":
        pytest.skip("calls the compiled ops")
