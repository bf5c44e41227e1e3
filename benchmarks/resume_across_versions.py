"""A run that goes on under another Megatron-Core, against the same run going on as it was.

python benchmarks/resume_across_versions.py PYTHON_A PYTHON_B --scratch DIR [--cases "TP 2" ...]

A trains two iterations and writes a checkpoint; A goes on for two more from one copy of it, B from
another, at the same layout, with gold responses, so that no engine takes part. What both have at
the end is compared bit by bit: metrics, the exported model, every tensor of the last checkpoint.
Then A tries to go on from B's checkpoint, which must be refused if B's Megatron-Core is newer, and
starts another run from its weights alone, which must work.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "e2e"), str(ROOT / "tests" / "distributed")]

from engine_models import write_model  # noqa: E402
from training_runs import recipe_of  # noqa: E402

from megatron_rl.weights.dcp_files import read_chunk, read_stored_tensors  # noqa: E402

CASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "one rank": ("qwen2", 1, ()),
    "TP 2": ("qwen2", 2, ("parallel.tensor_model_parallel_size=2",)),
    "PP 2, tied": ("qwen2_tied", 2, ("parallel.pipeline_model_parallel_size=2",)),
    "mixture, one rank": ("qwen3_moe", 1, ()),
    "mixture, EP 2": ("qwen3_moe", 2, ("parallel.expert_model_parallel_size=2",)),
}
ON_A_CLOCK = ("time/", "memory/", "tokens_per_s")
VERSIONS = (
    "import importlib.metadata as m, json, sys, torch;"
    "print(json.dumps({'Python': sys.version.split()[0], 'torch': torch.__version__,"
    " 'Megatron-Core': m.version('megatron-core')}))"
)


@dataclass(frozen=True)
class Trainer:
    """Starts runs of one model at one layout, in one folder."""

    folder: Path
    case: str

    def train(self, python: str, name: str, iterations: int, *more: str) -> tuple[int, str]:
        """Exit code and everything that a run said."""
        model, ranks, layout = CASES[self.case]
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(self.folder.parent / model, self.folder / name)))
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        settings = (f"run.num_iterations={iterations}", "checkpoint.save_every=2", *layout, *more)
        done = subprocess.run(
            [python, *start, "-m", "megatron_rl", "train", str(recipe), *settings],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def finish(self, python: str, name: str, iterations: int, *more: str) -> None:
        code, said = self.train(python, name, iterations, *more)
        if code:
            raise SystemExit(f"{self.case}, {name}: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python_a")
    parser.add_argument("python_b")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    options = parser.parse_args()
    for side, python in (("A", options.python_a), ("B", options.python_b)):
        print(f"{side}: {json.dumps(_versions(python))}", flush=True)
    print("\n| case | metrics | export | checkpoint | back to A | weights of B under A |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in options.cases:
        print(f"| {case} | {' | '.join(_row(case, options))} |", flush=True)


def _row(case: str, options: argparse.Namespace) -> Iterator[str]:
    folder = options.scratch / case.replace(" ", "_").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not (options.scratch / CASES[case][0]).exists():
        write_model(CASES[case][0], options.scratch / CASES[case][0])
    trainer = Trainer(folder, case)
    trainer.finish(options.python_a, "begun", 2)
    for name, python in (("a", options.python_a), ("b", options.python_b)):
        shutil.copytree(folder / "begun", folder / name)
        trainer.finish(python, name, 4)
    a, b = folder / "a", folder / "b"
    yield _difference(_records(a), _records(b))
    yield _difference(load_file(a / "hf/model.safetensors"), load_file(b / "hf/model.safetensors"))
    last = Path("checkpoints/iteration_000004/policy")
    yield _difference(_tensors(a / last), _tensors(b / last))
    code, said = trainer.train(options.python_a, "b", 6)
    yield "refused" if code and "wrote this checkpoint" in said else f"exit code {code}"
    weights = f"model.path={b / last.parent}"
    code, said = trainer.train(options.python_a, "from the weights", 1, weights)
    yield "a run starts" if code == 0 else said[-300:]


def _versions(python: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": ""}
    return json.loads(subprocess.check_output([python, "-c", VERSIONS], env=environment, text=True))


def _records(run: Path) -> dict[str, Any]:
    """Iteration and name of a metric -> value, without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{line['iteration']}: {name}": value
        for line in lines
        for name, value in line.items()
        if not any(part in name for part in ON_A_CLOCK)
    }


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, in whatever files and pieces it was written."""
    found = {}
    for key, stored in read_stored_tensors(directory).items():
        whole = torch.zeros(stored.shape, dtype=stored.dtype)
        for chunk in stored.chunks:
            whole[tuple(slice(low, high) for low, high in chunk.box)] = read_chunk(directory, chunk)
        found[key] = whole
    return found


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """How many entries are equal, and the largest difference of the others."""
    if a.keys() != b.keys():
        return f"other entries: {sorted(a.keys() ^ b.keys())[:3]}"
    unequal = [key for key in a if not _same(a[key], b[key])]
    if not unequal:
        return f"{len(a)} equal bit for bit"
    sizes = [abs(torch.as_tensor(a[k]).double() - torch.as_tensor(b[k]).double()) for k in unequal]
    largest = max(float(size.max()) for size in sizes)
    return f"{len(unequal)} of {len(a)} differ, by up to {largest:.1e}"


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if torch.is_tensor(a) else bool(a == b)


if __name__ == "__main__":
    main()
