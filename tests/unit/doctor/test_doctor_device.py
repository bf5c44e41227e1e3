"""GPUs that are there, that are not, and that torch cannot use, as torch and the driver tell it."""

import subprocess

import pytest
import torch

from megatron_rl.doctor import device
from megatron_rl.platforms import gpus
from megatron_rl.platforms.gpus import Gpu

GIB = 1 << 30


def h100(free_gib=78):
    return Gpu(name="H100", total_bytes=79 * GIB, free_bytes=free_gib * GIB, capability="9.0")


@pytest.fixture
def machine(monkeypatch):
    """Sets what torch sees, what the driver sees, and for what torch was built."""

    def set_to(visible=(), seen=None, cuda=None):
        monkeypatch.delenv("MEGATRON_RL_DEVICE", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(device, "visible_gpus", lambda: list(visible))
        monkeypatch.setattr(device, "seen_by_driver", lambda: seen)
        monkeypatch.setattr(device, "why_none", lambda: "driver too old")
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return set_to


def test_a_cpu_is_fine(machine, monkeypatch):
    machine()
    assert device.check_gpus().found == "none, CPU run"
    assert device.check_gpus().outcome == "ok"
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cuda")
    assert device.check_gpus().outcome == "failed"


def test_gpus_are_counted_with_memory_and_driver(machine):
    machine([h100(), h100()], (["H100", "H100"], "580.65"), "13.0")
    result = device.check_gpus()
    assert (result.outcome, result.found) == (
        "ok",
        "2 x H100, 79 GiB, compute 9.0; driver 580.65",
    )


def test_a_gpu_that_others_use_is_a_warning(machine):
    machine([h100(), h100(free_gib=12)], (["H100", "H100"], "580.65"), "13.0")
    result = device.check_gpus()
    assert result.outcome == "warning"
    assert result.found.endswith("others use GPU 1, down to 12.0 GiB free")


def test_gpus_that_torch_cannot_use(machine, monkeypatch):
    seen = (["H100"], "470.1")
    machine(seen=seen, cuda="13.0")
    result = device.check_gpus()
    assert (result.outcome, result.remedy) == ("failed", device.ON_CPU)
    assert result.found == (
        "1 x H100, driver 470.1, which torch cannot use (build for CUDA 13.0): driver too old"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.check_gpus().remedy == "unset CUDA_VISIBLE_DEVICES"
    machine(seen=seen, cuda=None)
    assert device.check_gpus().remedy == "MEGATRON_RL_DEVICE=cuda make install"


def test_a_driver_that_fails_is_told(machine, monkeypatch):
    def fails():
        raise subprocess.CalledProcessError(9, "nvidia-smi")

    machine()
    monkeypatch.setattr(device, "seen_by_driver", fails)
    assert device.check_gpus().outcome == "failed"


def test_what_the_driver_says_is_read(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'NVIDIA H100 80GB HBM3, 580.65.06\\nL4, 580.65.06\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus.seen_by_driver() == (["NVIDIA H100 80GB HBM3", "L4"], "580.65.06")
    program.write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(subprocess.CalledProcessError):
        gpus.seen_by_driver()
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpus.seen_by_driver() is None
