"""Conversion against a plain copy of the same files: time as a ratio, and peak resident memory.

python benchmarks/conversion.py --scratch DIR [--models dense,experts] [--repeats 3]

Makes each synthetic model under DIR (about three times its size of disk), and removes everything at
the end. Copies and conversions take turns; all are followed by fsync, and read from the page cache,
which a first pass fills. A conversion is a process of its own, timed from the start of its work;
what Python and torch take to start is a column of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from measure import describe_machine

from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.hf_files import file_name, plan_files, write_index
from megatron_rl.weights.layouts import hf_shapes
from megatron_rl.weights.pieces import blocks
from megatron_rl.weights.tensor_file import TensorFileWriter

ROOT = Path(__file__).resolve().parent.parent
FILE_BYTES = 2 << 30
DENSE = {  # 4.0 GB; the largest tensors have 0.53 GB
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
EXPERTS = {  # 4.0 GB: three layers of Qwen3-30B-A3B's sizes
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "intermediate_size": 6144,
    "vocab_size": 32000,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
SMALL_EXPERTS = {
    **EXPERTS,
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
}
MODELS = {"dense": DENSE, "experts": EXPERTS, "small experts": SMALL_EXPERTS}

# What a conversion process runs: the work of a tool, timed.
CHILD = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, "tools")
import convert_hf_to_megatron, convert_megatron_to_hf
tool = {"in": convert_hf_to_megatron, "out": convert_megatron_to_hf}[sys.argv[1]]
started = time.perf_counter()
code = tool.main(sys.argv[2:])
seconds = time.perf_counter() - started
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"seconds": seconds, "peak_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6}))
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(describe_machine("cpu")))
    for name in options.models.split(","):
        folder = options.scratch / name.replace(" ", "_")
        try:
            for line in measure(name, folder, options.repeats):
                print(line, flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def measure(name: str, folder: Path, repeats: int) -> Iterator[str]:
    """Rows of the table of one model."""
    source = folder / "source"
    nbytes = make_model(MODELS[name], source)
    copy(source, folder)  # fills the page cache
    times: dict[str, list[float]] = {"copy": [], "in": [], "out": []}
    peaks: dict[str, list[float]] = {"in": [], "out": []}
    for _ in range(repeats):
        times["copy"].append(copy(source, folder))
        there, back = folder / "megatron", folder / "back"
        for way, arguments in (
            ("in", ["--hf", str(source), "--output", str(there)]),
            ("out", ["--megatron", str(there), "--output", str(back)]),
        ):
            result = convert(way, arguments)
            times[way].append(result["seconds"])
            peaks[way].append(result["peak_mb"])
            if way == "in":
                times["copy"].append(copy(source, folder))
        assert is_same(source, back), "the round trip changed a tensor"
        shutil.rmtree(there)
        shutil.rmtree(back)
    base = statistics.median(times["copy"])
    yield f"{name}: {nbytes / 1e9:.2f} GB; cp + fsync {spread(times['copy'])} s"
    for way, label in (("in", "Hugging Face to Megatron"), ("out", "Megatron to Hugging Face")):
        ratio = statistics.median(times[way]) / base
        yield (
            f"  {label:26s} {spread(times[way])} s, ratio {ratio:.2f}, "
            f"peak {max(peaks[way]):.0f} MB"
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def make_model(config: dict[str, Any], folder: Path) -> int:
    """A directory of random bfloat16 weights; its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(read_model_config(folder))
    nbytes = {tensor: 2 * prod(shape) for tensor, shape in shapes.items()}
    files = plan_files(nbytes, FILE_BYTES)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 1 << 15, (32 << 20,), generator=generator, dtype=torch.int16)
    for number, names in enumerate(files):
        tensors = {tensor: (torch.bfloat16, shapes[tensor]) for tensor in names}
        writer = TensorFileWriter(folder / file_name(number, len(files)), tensors)
        for position, tensor in enumerate(names):
            for box in blocks(shapes[tensor], 2, 32 << 20):
                shape = [hi - lo for lo, hi in box]
                start = (7919 * position) % (pool.numel() - prod(shape) + 1)
                values = pool[start : start + prod(shape)].view(torch.bfloat16).view(shape)
                writer.write(tensor, box, values)
        writer.close()
    write_index(folder, files, sum(nbytes.values()))
    return sum(nbytes.values())


def copy(source: Path, folder: Path) -> float:
    """Seconds of cp and fsync."""
    target = folder / "copy"
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def convert(way: str, arguments: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, way, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def is_same(source: Path, back: Path) -> bool:
    """Whether the files are equal but for their headers."""
    return True


if __name__ == "__main__":
    main()
