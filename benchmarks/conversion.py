"""Conversion against a plain copy of the same files: time as a ratio, and peak resident memory.

python benchmarks/conversion.py --scratch DIR [--models dense,experts] [--repeats 3]

Makes each synthetic model under DIR (about four times its size of disk), and removes everything at
the end. Copies and conversions take turns, and a ratio is to the mean of the copies before and
after; all read from the page cache and end with fsync. A conversion is a process of its own, timed
from the start of its work: Python, torch and their imports take some seconds more. The machine
rests before each of them: a virtual machine gives pages that stay free for seconds back to its
host, and getting them again takes longer than a copy into pages that were freed just now.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import mean, median
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
REST_S = 10
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
SMALL_EXPERTS = {  # 1.0 GB in many small tensors, of 0.5 MB each
    **EXPERTS,
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "moe_intermediate_size": 256,
}
MODELS = {"dense": DENSE, "experts": EXPERTS, "small experts": SMALL_EXPERTS}

# What a conversion process runs: the command, timed from the end of its imports.
CHILD = """
import json, sys, time
import megatron_rl.conversion.to_hf, megatron_rl.conversion.to_megatron
import megatron_rl.megatron.refusals
from megatron_rl.commands.main import main
started = time.perf_counter()
code = main(["convert", *sys.argv[1:]])
seconds = time.perf_counter() - started
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"seconds": seconds, "peak_mb": int(status["VmHWM"].split()[0]) * 1024 / 1e6}))
sys.exit(code)
"""
WAYS = {
    "Hugging Face to Megatron-Core": "to-megatron",
    "Megatron-Core to Hugging Face": "to-hf",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(describe_machine("cpu")))
    print("| model | GB | cp + fsync, s | way | s | ratio | peak resident, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models.split(","):
        folder = options.scratch / name.replace(" ", "_")
        try:
            for row in measure(name, folder, options.repeats):
                print("| " + " | ".join(row) + " |", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def measure(name: str, folder: Path, repeats: int) -> Iterator[tuple[str, ...]]:
    """Rows of the table of one model; a ratio is the median of those of each turn."""
    source, there, back = folder / "source", folder / "megatron", folder / "back"
    nbytes = make_model(MODELS[name], source)
    arguments = {
        "to-megatron": ["--hf", source, "--output", there],
        "to-hf": [
            *("--megatron", there, "--output", back),
            *("--file-mib", FILE_BYTES >> 20),
        ],
    }
    copies = [copy(source, folder), copy(source, folder)][1:]  # the first fills the page cache
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, tool in WAYS.items():
            result = convert(tool, [str(argument) for argument in arguments[tool]])
            copies.append(copy(source, folder))
            results[way].append(result)
            ratios[way].append(result["seconds"] / mean(copies[-2:]))
        if not is_same(source, back):
            raise SystemExit("the round trip changed something")
        shutil.rmtree(there)
        shutil.rmtree(back)
    for way in WAYS:
        yield (
            name,
            f"{nbytes / 1e9:.2f}",
            spread(copies),
            way,
            spread([result["seconds"] for result in results[way]]),
            spread(ratios[way]),
            f"{max(result['peak_mb'] for result in results[way]):.0f}",
        )


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


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
    time.sleep(REST_S)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in target.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def convert(tool: str, arguments: list[str]) -> dict[str, float]:
    """What CHILD prints."""
    time.sleep(REST_S)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tool, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def is_same(source: Path, back: Path) -> bool:
    """Whether all files are, byte for byte: they were written by the same plan."""
    names = sorted(path.name for path in source.iterdir())
    return names == sorted(path.name for path in back.iterdir()) and all(
        filecmp.cmp(source / name, back / name, shallow=False) for name in names
    )


if __name__ == "__main__":
    main()
