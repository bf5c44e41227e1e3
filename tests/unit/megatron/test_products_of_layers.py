"""The parallel layers of Megatron-Core multiply by our product on a CPU, and nothing else does."""

import subprocess
import sys

CODE = """
import inspect, torch
from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import CPU
enter(CPU)
import megatron_rl.megatron.on_cpu as on_cpu
from megatron.core.tensor_parallel import layers
assert layers.__dict__[on_cpu._PRODUCT_NAME] is on_cpu.product
calls = []
layers.__dict__[on_cpu._PRODUCT_NAME] = lambda left, right: calls.append(0) or left @ right
linear = layers.LinearWithGradAccumulationAndAsyncCommunication
x, w = torch.randn(6, 1, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
options = list(inspect.signature(linear.forward).parameters)[4:]
linear.apply(x, w, None, *[None if "buffer" in name or "group" in name else False
                           for name in options]).sum().backward()
assert len(calls) == 3, calls
assert torch.allclose(x.grad, w.sum(0).expand_as(x))
assert torch.allclose(w.grad, x.detach().sum((0, 1)).expand_as(w), atol=1e-5)
"""


def test_forward_and_both_gradients_go_through_it():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
