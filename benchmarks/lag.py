"""Iterations whose ranks sample and train at once, beside the same ranks in turns.

    python benchmarks/lag.py --turns 3 --folder /tmp/lag --output benchmarks/results/lag.json

Two ranks on one machine, a thread each: the first trains, the second samples. Whole runs take
turns, at run.lag=0 and at run.lag=1, of a model with random weights whose update and rollout take
about as long. What is compared is the median of all iterations of all turns but each run's first
ones, in which nothing has been sampled ahead. A reward that a random model earns half of the time
keeps every response in the update.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from launched import make_model, recipe_of, start

FIRST = 3  # iteration that is compared
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
PHASES = ("rollout", "sampling", "update", "weight_sync", "iteration")
WRITE_MODEL = """
import sys, json, torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
vocab = AutoConfig.from_pretrained(sys.argv[2]).vocab_size
shape = LlamaConfig(vocab_size=vocab, **json.loads(sys.argv[1]))
LlamaForCausalLM(shape).save_pretrained(sys.argv[3])
"""


def is_even(response: str, answer: str) -> bool:
    return sum(response.encode()) % 2 == 0


def make(folder: Path) -> Path:
    """The quickstart's tokenizer with a larger network."""
    small, model = make_model(folder / "small"), folder / "model"
    if not model.exists():
        command = [sys.executable, "-c", WRITE_MODEL, json.dumps(SHAPE), str(small), str(model)]
        subprocess.run(command, check=True)
        for path in small.glob("tokenizer*"):
            shutil.copy(path, model)
    return model


def measured(folder: Path, model: Path, lag: int, iterations: int, size: int) -> dict[str, Any]:
    """Seconds by phase of every iteration that counts."""
    output = folder / f"lag_{lag}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = recipe_of(
        model,
        output,
        iterations,
        run={"lag": lag},
        prompts={"prompts_per_iteration": 32},
        rollout={"group_size": 8, "max_response_tokens": size, "separate_ranks": 1},
        reward={"kind": "lag:is_even"},
        algorithm={"preset": "grpo"},
        optimizer={"prompts_per_update": 16, "lr": 1e-6},
        checkpoint={"save_every": 0},
        metrics={"kl_every": 0},
    )
    process = start(recipe, 2, folder / "log.txt", mark=f"lag {lag}")
    if process.wait():
        raise SystemExit((folder / "log.txt").read_text()[-4000:])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = [f"time/{phase}_s" for phase in PHASES]
    return {name: [row.get(name, 0.0) for row in rows[FIRST - 1 : -1]] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--size", type=int, default=48, help="tokens of a response")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/lag"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    model = make(options.folder)
    found: dict[int, dict[str, list[float]]] = {0: {}, 1: {}}
    for _ in range(options.turns):
        for lag, seconds in found.items():
            run = measured(options.folder, model, lag, options.iterations, options.size)
            for name, values in run.items():
                seconds.setdefault(name, []).extend(values)
    medians = {
        f"lag {lag}": {name: round(median(values), 4) for name, values in seconds.items()}
        for lag, seconds in found.items()
    }
    whole = [medians[f"lag {lag}"]["time/iteration_s"] for lag in (0, 1)]
    result = {
        "command": " ".join(["python", "benchmarks/lag.py", *sys.argv[1:]]),
        "iterations": len(found[0]["time/iteration_s"]),
        "medians": medians,
        "lag 1 / lag 0": round(whole[1] / whole[0], 3),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
