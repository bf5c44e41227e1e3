"""All ranks run the same ops, or none starts."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness import run_on_ranks

from megatron_rl.errors import ConfigErrors, RunError
from megatron_rl.ops import backend, native


@pytest.mark.skipif(not native.BUILT, reason=f"no native ops: {native.FAULT}")
def test_ranks_with_different_ops_all_stop():
    run_on_ranks(3, check_choices)


def check_choices() -> None:
    from megatron_rl.build import choose_ops

    device = torch.device("cpu")
    platform = SimpleNamespace(current_device=lambda: device)
    groups = SimpleNamespace(platform=platform, world=dist.group.WORLD)
    assert choose_ops("auto", groups) == "ops: native, cpu"

    is_odd_one = dist.get_rank() == 1
    has = (lambda op, device: False) if is_odd_one else native.has
    with mock.patch.object(native, "has", has):
        with pytest.raises(RunError, match=r"definitions.* on ranks \[1\]") as told:
            choose_ops("auto", groups)
        for part in ("ops.backend=auto", "'ops: native, cpu' on ranks [0, 2]", "=reference"):
            assert part in str(told.value)
        with pytest.raises(ConfigErrors if is_odd_one else RunError, match="no native ops"):
            choose_ops("native", groups)
        assert choose_ops("reference", groups) == "ops: PyTorch definitions"
    backend.choose("auto", device)
