"""What saving adds to training, waited for and in the background, at two sizes of model.

    python benchmarks/saving_time.py --turns 3 --folder /tmp/saving \
        --output benchmarks/results/saving_time.md

Supervised runs of two data-parallel ranks under torchrun, whole runs in turns: one without a save,
one whose saves are waited for, one with checkpoint.async_save. A save holds weights, optimizer and
the Hugging Face export. What one adds is the mean of all iterations but the first with saves, less
that without, times the iterations between two saves; so the slower training beside a save that is
being written counts too.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from launched import SMOLLM2, make_model, recipe_of, start

VARIANTS: dict[str, dict[str, Any]] = {
    "no saves": {"save_every": 0},
    "waited for": {},
    "async_save": {"async_save": True},
}
WRITE_MODEL = """
import sys, json, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1]))).save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Case:
    """A size of model, and how often it is saved."""

    name: str
    shape: dict[str, Any] | None
    prompts: int
    iterations: int
    save_every: int


CASES = (
    Case("0.15 M", None, prompts=16, iterations=41, save_every=4),
    Case("135 M", SMOLLM2, prompts=8, iterations=13, save_every=4),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# What saving adds",
        "",
        f"`benchmarks/saving_time.py --turns {options.turns}`: seconds of an iteration (mean, best "
        "turn and median turn), and seconds that a save adds (median turn).",
        "",
        "| parameters | saved every | saves | s per iteration, best | median | a save adds, s |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        told = measure(case, options.folder, options.turns)
        print(json.dumps({case.name: told}), flush=True)
        plain = median(told["no saves"])
        for name, seconds in told.items():
            added = (median(seconds) - plain) * case.save_every
            lines.append(
                f"| {case.name} | {case.save_every} | {name} | {min(seconds):.3f} | "
                f"{median(seconds):.3f} | {'' if name == 'no saves' else f'{added:.2f}'} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


def measure(case: Case, folder: Path, turns: int) -> dict[str, list[float]]:
    """Mean seconds of an iteration, of every variant and turn."""
    model = model_of(case, folder)
    told: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(turns):
        for name, settings in VARIANTS.items():
            output = folder / "run"
            shutil.rmtree(output, ignore_errors=True)
            recipe = recipe_of(
                model,
                output,
                case.iterations,
                algorithm={"preset": "sft"},
                prompts={"prompts_per_iteration": case.prompts},
                optimizer={"lr": 1e-5, "prompts_per_update": case.prompts},
                checkpoint={"save_every": case.save_every, "keep_last": 1, **settings},
            )
            log = folder / f"{case.name} {name} {turn}.log"
            code = start(recipe, 2, log, mark=str(folder)).wait()
            assert code == 0, log.read_text()[-3000:]
            # The time of a save is billed to the iteration after it.
            told[name].append(
                mean(
                    json.loads(line)["time/iteration_s"]
                    for line in (output / "metrics.jsonl").read_text().splitlines()[1:]
                )
            )
    return told


def model_of(case: Case, folder: Path) -> Path:
    tiny = make_model(folder / "model")
    if case.shape is None:
        return tiny
    directory = folder / f"model {case.name}"
    if not directory.exists():
        shutil.copytree(tiny, directory)
        command = [sys.executable, "-c", WRITE_MODEL, json.dumps(case.shape), str(directory)]
        subprocess.run(command, check=True)
    return directory


if __name__ == "__main__":
    main()
