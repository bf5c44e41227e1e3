"""Supervised runs, so that no engine is needed: started as a user starts them, or on ranks."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from engine_models import QUICKSTART
from forked import run_command
from harness import STUCK_S

ROOT = Path(__file__).parents[2]
IMPORTABLE = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])  # coin_reward, for one
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": IMPORTABLE}
FAULTY = str(Path(__file__).with_name("faulty_train.py"))
LAST = "iteration_000006"
TP2 = ("parallel.tensor_model_parallel_size=2",)
PP2 = ("parallel.pipeline_model_parallel_size=2",)
RUN_ON_CLOCK = ("time/", "memory/", "tokens_per_s")


def recipe_of(model_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Six iterations of two updates each; the learning rate changes at every update."""
    return {
        "run": {"output_dir": str(output_dir), "num_iterations": 6, "seed": 7},
        "model": {"path": str(model_dir), "dtype": "float32"},
        "prompts": {
            "path": str(QUICKSTART / "data" / "train.jsonl"),
            "prompts_per_iteration": 12,
            "max_prompt_tokens": 64,
        },
        "rollout": {"max_response_tokens": 96},
        "algorithm": {"preset": "sft"},
        "batching": {"max_tokens_per_microbatch": 160},
        "optimizer": {
            "lr": 1e-3,
            "lr_schedule": "cosine",
            "lr_warmup_updates": 2,
            "lr_decay_updates": 13,
            "prompts_per_update": 6,
        },
        "checkpoint": {"save_every": 3},
    }


class Runs:
    """Starts runs in a folder; a run is its output directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(self, name: str, ranks: int, *overrides: str) -> tuple[int, str]:
        """Exit code and everything printed."""
        return self.command("train", name, ranks, *overrides)

    def train_with_fault(
        self, fault: str, place: str, name: str, *overrides: str
    ) -> tuple[int, str, float]:
        """The same of two ranks, of which one meets a fault; and the seconds since it did."""
        moment = self.folder / f"{name}.moment"
        program = (FAULTY, fault, place, str(moment))
        done = self.start("train", name, 2, *overrides, stderr=subprocess.STDOUT, program=program)
        return done.returncode, done.stdout, time.time() - moment.stat().st_mtime

    def command(self, command: str, name: str, ranks: int, *overrides: str) -> tuple[int, str]:
        """The same of any command that takes a recipe, on ranks that have imported everything."""
        return run_command([command, str(self.recipe(name)), *overrides], ranks, ROOT, ENVIRONMENT)

    def recipe(self, name: str) -> Path:
        """The file of the recipe that writes into the folder of this name."""
        path = self.folder / f"{name}.yaml"
        recipe = recipe_of(self.folder / "models" / "qwen2", self.folder / name)
        path.write_text(yaml.safe_dump(recipe))
        return path

    def start(
        self,
        command: str,
        name: str,
        ranks: int,
        *overrides: str,
        stderr: int,
        program: tuple[str, ...] = ("-m", "megatron_rl"),
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as a user does, to its end, its stderr where the caller wants it."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        start = (*(torchrun if ranks > 1 else ()), *program)
        # A pipe, as `| tee` is: it closes when the last process of the run has ended.
        return subprocess.run(
            [sys.executable, *start, command, str(self.recipe(name)), *overrides],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=STUCK_S,
        )

    def finish(self, name: str, ranks: int, *overrides: str) -> str:
        code, said = self.train(name, ranks, *overrides)
        assert code == 0, said
        return said

    def straight(self, layout: str, ranks: int, *overrides: str) -> str:
        """The run of a layout from start to end, made once."""
        name = f"straight {layout}"
        if not (self.folder / name).exists():
            self.finish(name, ranks, *overrides)
        return name

    def copy(self, name: str, as_name: str) -> Path:
        shutil.copytree(self.folder / name, self.folder / as_name)
        return self.folder / as_name

    def records(self, name: str) -> list[dict[str, Any]]:
        """Metrics, without what a clock or the machine says."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not any(c in k for c in RUN_ON_CLOCK)}
            for line in lines
        ]

    def files(self, name: str) -> dict[str, list[Any]]:
        """Size and digest of every file of the last checkpoint but the index of tensors, a pickle
        whose bytes depend on addresses."""
        manifest = self.folder / name / "checkpoints" / LAST / "MANIFEST.json"
        files = json.loads(manifest.read_text())["files"]
        del files["policy/.metadata"]
        return files


def exported(output_dir: Path) -> bytes:
    return (output_dir / "hf" / "model.safetensors").read_bytes()


def build(model_dir: Path, output_dir: Path, tp: int, pp: int, **optimizer: Any) -> Any:
    import preload_megatron  # noqa: F401
    import torch.distributed as dist

    from megatron_rl.build import build_run
    from megatron_rl.config import RunConfig
    from megatron_rl.platforms.base import detect
    from megatron_rl.preflight import read_inputs

    recipe = recipe_of(model_dir, output_dir)
    recipe["parallel"] = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    recipe["optimizer"] |= optimizer
    config = RunConfig.model_validate(recipe)
    output_dir.mkdir(parents=True, exist_ok=True)
    inputs = read_inputs(config, dist.get_world_size())
    return build_run(config, inputs, detect(), say=lambda line: None)


def everywhere(item: Any) -> list[Any]:
    import torch.distributed as dist

    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def error_of(work: Any, kind: type[Exception]) -> str:
    try:
        work()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")
