"""An installation that could compile the ops has compiled them.

`make install` goes on without what does not compile, so that a machine without a compiler can be
used; a fault of csrc/ would then only skip the tests of the ops.
"""

import os
import shutil

import pytest

from megatron_rl.ops import native

WANTED = os.environ.get("MEGATRON_RL_CSRC") or "auto"


@pytest.mark.skipif(WANTED == "off", reason="MEGATRON_RL_CSRC=off")
@pytest.mark.skipif(not shutil.which("c++"), reason="there is no compiler")
def test_the_ops_of_a_cpu_are_there():
    assert "cpu" in native.devices(), native.FAULT


@pytest.mark.skipif(WANTED in ("off", "cpu"), reason=f"MEGATRON_RL_CSRC={WANTED}")
@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
def test_the_ops_of_a_gpu_are_there():
    assert "cuda" in native.devices(), native.FAULT
