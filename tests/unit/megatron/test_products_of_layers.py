"""What Megatron-Core's parallel layers do otherwise on a CPU: products, an embedding's gradient."""

import subprocess
import sys

START = """
import inspect, torch
from types import SimpleNamespace
from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import CPU
enter(CPU)
import megatron_rl.megatron.on_cpu as on_cpu
from megatron.core.tensor_parallel import layers
"""

PRODUCTS = """
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

EMBEDDING = """
weight, before = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
alone = SimpleNamespace(size=lambda: 1)
module = SimpleNamespace(tp_group=alone, weight=weight, deterministic_mode=False,
                         reduce_scatter_embeddings=False, gtp_remat_size=1)
layers.reduce_from_tensor_model_parallel_region = lambda values, group: values
ids, grad = torch.tensor([[2, 5, 2], [0, 2, 8]]), torch.randn(2, 3, 4)
looked_up = layers.VocabParallelEmbedding.forward(module, ids)
assert torch.equal(looked_up, weight[ids])
looked_up.backward(grad)
assert weight.grad.is_sparse and weight.grad._nnz() == ids.numel()
expected = before.double()
for token, row in zip(ids.flatten(), grad.flatten(0, 1)):
    expected[token] += row.double()
main_grad = before.clone()
main_grad.add_(weight.grad.data)  # as the hook of Megatron's DDP does it
assert torch.allclose(main_grad.double(), expected, atol=1e-6)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_forward_and_both_gradients_of_a_layer_go_through_our_product():
    run(PRODUCTS)


def test_the_gradient_of_an_embedding_has_the_rows_that_were_looked_up():
    run(EMBEDDING)
