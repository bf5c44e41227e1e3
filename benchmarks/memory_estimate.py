"""What `plan` says that a rank needs on a CPU, by what a run then held.

    python benchmarks/memory_estimate.py --folder /tmp/memory --output benchmarks/results/memory.md

Whole runs of three iterations, in turn, of one rank and one process, whose rows are full; each
saves a checkpoint after every iteration unless its case says otherwise. Measured is the metric
memory/peak_gib, the largest resident memory of the process; what is estimated comes from the very
recipe. Needs 6 GiB of free memory; --cases names some of the cases.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from launched import make_model
from measure import describe_machine, load_average

from megatron_rl.config import load_config
from megatron_rl.memory import GIB, need_of
from megatron_rl.weights.families.registry import read_model_config

ROOT = Path(__file__).parents[1]
WRITE_MODEL = """
import sys, json, torch, transformers
family, settings, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
config = getattr(transformers, f"{family}Config")(**settings)
getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(output)
"""
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BY_VLLM = {
    "algorithm": {"preset": "reinforce"},
    "rollout": {"engine": "vllm", "group_size": 4, "max_response_tokens": 48},
    "reward": {"kind": "number", "num_workers": 1},
}
BY_POLICY = BY_VLLM | {"rollout": {**BY_VLLM["rollout"], "engine": "megatron"}}


def shape(hidden: int, ffn: int, layers: int, heads: int, keys: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "max_position_embeddings": 1024,
    }


SMALL, MIDDLE = shape(256, 704, 8, 4, 2, 8192), shape(512, 1536, 12, 8, 8, 16384)
SMOLLM = shape(576, 1536, 30, 9, 3, 49152)
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
UNSAVED = {"checkpoint": {"save_every": 0}}


@dataclass(frozen=True)
class Case:
    """A model and what its recipe has besides a row's length."""

    family: str
    sizes: dict[str, Any]
    row: int
    recipe: dict[str, Any] = field(default_factory=dict)


CASES = {
    "7 M, rows of 1,024": Case("Llama", SMALL, 1024),
    "7 M, rows of 4,096": Case("Llama", SMALL, 4096),
    "7 M, bfloat16": Case("Llama", SMALL, 4096, {"model": {"dtype": "bfloat16"}}),
    "7 M, recompute": Case("Llama", SMALL, 4096, {"model": FULL}),
    "7 M, norms of heads": Case("Qwen3", {**SMALL, "head_dim": 64}, 4096),
    "mixture, 8 experts of which 2": Case("Qwen3Moe", {**SMALL, **EXPERTS, "head_dim": 64}, 4096),
    "7 M, sampled by vLLM": Case("Llama", SMALL, 2048, BY_VLLM),
    "7 M, sampled by the policy": Case("Llama", SMALL, 2048, BY_POLICY),
    "49 M, rows of 2,048": Case("Llama", MIDDLE, 2048),
    "49 M, no checkpoints": Case("Llama", MIDDLE, 2048, UNSAVED),
    "135 M, rows of 1,024": Case("Llama", SMOLLM, 1024),
    "135 M, recompute": Case("Llama", SMOLLM, 2048, {"model": FULL}),
    "135 M, sampled by vLLM, recompute": Case("Llama", SMOLLM, 1024, {**BY_VLLM, "model": FULL}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="models and runs")
    parser.add_argument("--output", type=Path, help="a page of Markdown")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args(arguments)
    lines = ["| case | estimated GiB | measured GiB | ratio |", "|---|---|---|---|"]
    for name in options.cases:
        estimated, measured = compare(CASES[name], options.folder / name.replace(" ", "_"))
        ratio = estimated / measured
        lines.append(f"| {name} | {estimated:.2f} | {measured:.2f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    if options.output is not None:
        machine = ", ".join(describe_machine("cpu").values())
        page = [__doc__.partition("\n")[0], "", f"{machine}; {load_average()}", "", *lines]
        options.output.write_text("\n".join(page) + "\n")


def compare(case: Case, folder: Path) -> tuple[float, float]:
    """GiB of the estimate and of the run."""
    model, output, recipe = folder / "model", folder / "run", folder / "recipe.yaml"
    make_model(model)
    write = [sys.executable, "-c", WRITE_MODEL, case.family, json.dumps(case.sizes), str(model)]
    subprocess.run(write, check=True, capture_output=True)
    recipe.write_text(yaml.safe_dump(recipe_of(case, model, output)))
    config = load_config(recipe, [])
    arch = read_model_config(model, [])
    need = need_of(config, arch, config.parallel.layout(1), "cpu")
    train = [sys.executable, "-m", "megatron_rl", "train", str(recipe)]
    done = subprocess.run(
        train,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MEGATRON_RL_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return need.total / GIB, max(record["memory/peak_gib"] for record in records)


def recipe_of(case: Case, model: Path, output: Path) -> dict[str, Any]:
    is_sampled = "reward" in case.recipe
    recipe: dict[str, Any] = {
        "run": {"output_dir": str(output), "num_iterations": 3, "resume": "never"},
        "model": {"path": str(model), "dtype": "float32", **case.recipe.get("model", {})},
        "prompts": {
            "path": str(ROOT / "examples" / "quickstart" / "data" / "train.jsonl"),
            # Of some 35 tokens each, with its response; sampled ones are longer, and four.
            "prompts_per_iteration": case.row // (160 if is_sampled else 20),
            "max_prompt_tokens": 16,
        },
        "rollout": {"max_response_tokens": 48},
        "algorithm": {"preset": "sft"},
        "batching": {"max_tokens_per_microbatch": case.row},
        "checkpoint": {"save_every": 1, "keep_last": 1},
    }
    return {**recipe, **{k: v for k, v in case.recipe.items() if k != "model"}}


if __name__ == "__main__":
    main()
