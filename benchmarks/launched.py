"""Small runs under a real torchrun, to be disturbed and watched from outside."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples" / "quickstart" / "data"
MARK = "MEGATRON_RL_BENCHMARK_RUN"
SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
"""Of the config.json of SmolLM2-135M."""
OF_A_CLOCK = ("time/", "memory/", "tokens_per_s", "weights/verified_tensors")


def make_model(directory: Path) -> Path:
    """The quickstart's untrained model: two layers, 146,112 parameters."""
    if not (directory / "config.json").exists():
        program = ROOT / "examples" / "quickstart" / "make_model.py"
        subprocess.run([sys.executable, program, "--output", directory], cwd=ROOT, check=True)
    return directory


def recipe_of(model: Path, output: Path, iterations: int, **sections: Any) -> dict[str, Any]:
    """Sections are added to the recipe, or merged into those that it has."""
    recipe: dict[str, Any] = {
        "run": {"output_dir": str(output), "num_iterations": iterations, "seed": 7},
        "model": {"path": str(model), "dtype": "float32"},
        "prompts": {
            "path": str(DATA / "train.jsonl"),
            "prompts_per_iteration": 16,
            "max_prompt_tokens": 16,
        },
        "rollout": {"max_response_tokens": 48},
        "reward": {"num_workers": 1},
        "optimizer": {"lr": 1e-3, "prompts_per_update": 8},
        "metrics": {"console": "plain"},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    return recipe


def start(
    recipe: Mapping[str, Any],
    ranks: int,
    log: Path,
    *,
    mark: str,
    program: Sequence[str] = ("-m", "megatron_rl"),
) -> subprocess.Popen[bytes]:
    """Start torchrun in a session of its own; all of its processes carry the mark."""
    path = Path(recipe["run"]["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(dict(recipe)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *program, "train", str(path)]
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def marked(mark: str) -> dict[int, str | None]:
    """Pid -> rank of all processes with the mark, which each inherits from torchrun."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = path.read_text(errors="replace").split("\0")
        except OSError:
            continue
        environment = dict(entry.partition("=")[::2] for entry in entries)
        if environment.get(MARK) == mark:
            found[int(path.parent.name)] = environment.get("RANK")
    return found


def ranks_of(mark: str) -> dict[int, str]:
    """Pid -> rank of the training processes; reward workers have the environment of a rank too."""
    found = {}
    for pid, rank in marked(mark).items():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if rank is not None and "megatron_rl" in command and "train" in command:
            found[pid] = rank
    return found


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """True where it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def num_records(output: Path) -> int:
    """Iterations that are recorded."""
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def records(output: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock or the machine says."""
    return [
        {k: v for k, v in json.loads(line).items() if not any(part in k for part in OF_A_CLOCK)}
        for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
