"""What a conversion holds in memory does not grow with the model, nor with its largest tensor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversion_models import CONFIGS, SIZES
from safetensors.torch import save_file

from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.layouts import hf_shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
MODEL = {  # 0.63 GB in bfloat16; the embedding and the head have 0.26 GB each
    **SIZES,
    **CONFIGS["mistral"],
    "hidden_size": 2048,
    "vocab_size": 64000,
    "intermediate_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}
LARGEST_TENSOR = 2 * 64000 * 2048
ALLOWED = 150e6  # bytes over what the imports take; seen: 97e6 in, 72e6 out
CHILD = """
import json, sys
import megatron_rl.conversion.to_hf, megatron_rl.conversion.to_megatron
import megatron_rl.megatron.refusals
from megatron_rl.commands.main import main

def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(status["VmHWM"].split()[0])

before = peak()
assert main(["convert", *sys.argv[1:]]) == 0
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(MODEL))
    shapes = hf_shapes(read_model_config(folder / "hf"))
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).fill_(number)
        for number, (name, shape) in enumerate(shapes.items())
    }
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert sum(tensor.nbytes for tensor in tensors.values()) > 4 * ALLOWED
    assert LARGEST_TENSOR > 1.5 * ALLOWED
    yield folder
    shutil.rmtree(folder)


def memory_of(direction: str, *arguments: str | Path) -> float:
    """Bytes that a conversion takes beyond its imports, at its peak."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, direction, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def test_memory_is_bounded_both_ways(folder):
    there, back = folder / "megatron", folder / "back"
    used_in = memory_of("to-megatron", "--hf", folder / "hf", "--output", there)
    used_out = memory_of("to-hf", "--megatron", there, "--output", back)
    assert (folder / "hf" / "model.safetensors").stat().st_size > LARGEST_TENSOR
    assert max(used_in, used_out) < ALLOWED, (used_in, used_out)
