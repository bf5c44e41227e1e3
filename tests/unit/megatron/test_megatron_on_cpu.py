"""What is compiled of Megatron-Core's source for a CPU is kept, and never taken for another's."""

import importlib.util
import os
import subprocess
import sys

import pytest

from megatron_rl.megatron import on_cpu

SOURCE = "# cuda\ndef place():\n    return 'cuda'\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """(loader, source file, file of compiled code) of a module that names CUDA."""
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    path = tmp_path / "places.py"
    path.write_text(SOURCE)
    kept = importlib.util.cache_from_source(str(path), optimization="megatronrlcpu")
    return on_cpu._Loader("megatron.core.places", str(path), "cpu"), path, tmp_path / kept


def place(loader):
    space = {}
    exec(loader.get_code("megatron.core.places"), space)
    return space["place"]()


def forbid_compiling(monkeypatch):
    def parse(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(on_cpu.ast, "parse", parse)


def test_it_is_compiled_once_and_beside_the_stock_code(module, monkeypatch):
    loader, path, kept = module
    assert place(loader) == "cpu"
    assert list(kept.parent.iterdir()) == [kept]
    forbid_compiling(monkeypatch)
    assert place(loader) == "cpu"
    # What Python itself imports is the file as it stands.
    spec = importlib.util.spec_from_file_location("stock", path)
    stock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock)
    assert stock.place() == "cuda"


def test_another_source_of_the_same_time_and_size_is_compiled(module):
    loader, path, _ = module
    assert place(loader) == "cpu"
    path.write_text(SOURCE.replace("'cuda'", "'CUDA'"))
    assert place(loader) == "CUDA"


@pytest.mark.parametrize("damage", [b"", b"nothing of ours"])
def test_a_damaged_file_is_made_anew(module, damage):
    loader, _, kept = module
    assert place(loader) == "cpu"
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert place(loader) == "cpu"
    assert kept.read_bytes() == whole
    kept.write_bytes(whole[:-10])
    assert place(loader) == "cpu"
    assert kept.read_bytes() == whole


def test_code_that_another_rewriting_made_is_not_taken(module, monkeypatch):
    loader, _, kept = module
    monkeypatch.setattr(on_cpu, "_MADE_BY", b"of an older version")
    place(loader)
    older = kept.read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    assert place(loader) == "cpu"
    assert kept.read_bytes() != older


# As an image for GPUs has it on a machine without one.
PACKAGE_OF_A_GPU = 'raise RuntimeError("Found no NVIDIA driver on your system")\n'
ADAM_OF_TORCH = """
from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import CPU

enter(CPU)
import megatron.core.optimizer as optimizer
import torch

assert optimizer.Adam is torch.optim.AdamW, optimizer.Adam
"""


CLIPPED = """
from megatron_rl.megatron.enter import enter
from megatron_rl.platforms.base import CPU

enter(CPU)
import megatron.core.optimizer.clip_grads as clip_grads
import torch

parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 1 << 22)]
for parameter in parameters:
    parameter.grad = torch.full_like(parameter, 4.0)
places = [parameter.grad.data_ptr() for parameter in parameters]
with torch.profiler.profile(profile_memory=True) as profiler:
    clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=1.0, total_norm=4.0)
for parameter in parameters:
    torch.testing.assert_close(parameter.grad, torch.ones_like(parameter), atol=1e-6, rtol=0)
assert places == [parameter.grad.data_ptr() for parameter in parameters]
made = max(event.cpu_memory_usage for event in profiler.events())
assert made < 1 << 20, f"{made} bytes were made anew"

source, target = torch.tensor([1.0009765625, -3.0]), torch.empty(2, dtype=torch.bfloat16)
scale = clip_grads.multi_tensor_scale_impl
clip_grads.multi_tensor_applier(scale, None, [[source], [target]], 1.0)
assert target.tolist() == [1.0, -3.0], target
assert source.tolist() == [1.0009765625, -3.0], source
"""


def test_packages_of_a_gpu_do_not_come_between(tmp_path):
    for name in on_cpu.OF_A_GPU:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(PACKAGE_OF_A_GPU)
    importable = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", ADAM_OF_TORCH],
        env=os.environ | {"PYTHONPATH": importable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_gradients_are_clipped_where_they_are():
    done = subprocess.run([sys.executable, "-c", CLIPPED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
