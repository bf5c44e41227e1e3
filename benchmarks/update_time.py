"""Processor time of one policy update, of several installations in turns.

    python benchmarks/update_time.py \
        --variant "0.16.1" .venv/bin/python . \
        --variant "0.19.2" ../other/bin/python . \
        --output benchmarks/results/update_time.md

A variant is a name, a Python, and what goes before its packages: the root of a source tree, and
after a colon other folders (an unpacked wheel of Megatron-Core, say). The processes of all variants
stand side by side, one thread a rank, and all but one wait: variants take turns by the update, so
that the machine's load meets all of them. Seconds are those of the processors, user and system,
summed over the ranks; a ratio is the median over the turns of a variant's seconds by those of the
first variant in the same turn.

An update is everything that Trainer.update does: forward, backward, reduction, optimizer step.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from synthetic import SIZES, synthetic_groups

from megatron_rl.types import MiniBatch, RolloutGroup

WARM_UP = 2
GROUPS, PROMPT_TOKENS, ROW_TOKENS = 8, 24, 2048
REWARDS = (1.0, -1.0, 1.0, -1.0)  # so that no response is left out
RESPONSE_TOKENS = (8, 95)
ANSWER = "processor seconds: "
EXPERTS = {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Case:
    """A model at a layout."""

    family: str
    tp: int


Variant = tuple[str, str, str]
"""A name, a Python, and the folders before its packages."""
Seconds = dict[str, list[float]]
CASES = {
    "one rank": Case("qwen2", 1),
    "TP 2": Case("qwen2", 2),
    "mixture of experts, one rank": Case("mixtral", 1),
}


class Job:
    """The waiting ranks of one variant."""

    def __init__(self, python: str, paths: str, case: str, models: Path) -> None:
        command = [python, __file__, "--rank-of", case, "--models", str(models)]
        shared = {
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "WORLD_SIZE": str(CASES[case].tp),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(_free_port()),
        }
        self.ranks = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(CASES[case].tp)
        ]

    def seconds(self) -> float:
        """Processor seconds of one more update, of all ranks."""
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write("update\n")
            rank.stdin.flush()
        return sum(_answer(rank) for rank in self.ranks)

    def end(self) -> None:
        for rank in self.ranks:
            rank.communicate()  # which closes its input: there is no more to do


def _answer(rank: subprocess.Popen[str]) -> float:
    assert rank.stdout is not None
    for line in rank.stdout:
        if line.startswith(ANSWER):
            return float(line.removeprefix(ANSWER))
    raise SystemExit(f"a rank ended with {rank.wait()}: its own messages are above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(variants: Sequence[Variant], case: str, models: Path, turns: int) -> Seconds:
    """Variant -> seconds of each turn."""
    jobs = {name: Job(python, paths, case, models) for name, python, paths in variants}
    told: Seconds = {name: [] for name in jobs}
    for turn in range(WARM_UP + turns):
        names = list(jobs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = jobs[name].seconds()
            if turn >= WARM_UP:
                told[name].append(seconds)
    for job in jobs.values():
        job.end()
    return told


def write_models(folder: Path) -> None:
    """Random models of about ten million parameters."""
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

    for config in (Qwen2Config(**SIZES), MixtralConfig(**SIZES | EXPERTS)):
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / config.model_type)


def run_rank(case: Case, models: Path) -> None:
    """Make an update for each line of standard input, and tell its seconds."""
    from megatron_rl.megatron.enter import enter
    from megatron_rl.parallel.groups import init_distributed
    from megatron_rl.platforms.base import detect

    platform = detect()
    enter(platform)  # before the first import of megatron.core
    init_distributed(platform)
    update = make_update(case, models / case.family)
    for _ in sys.stdin:
        start = time.process_time()
        update()
        print(f"{ANSWER}{time.process_time() - start}", flush=True)


def make_update(case: Case, folder: Path) -> Any:
    """The update, to be called as often as one likes; every rank calls it."""
    trainer, pack = make_trainer(case, folder, row_tokens=ROW_TOKENS)
    batches = pack(
        synthetic_groups(
            [REWARDS] * GROUPS, prompt_tokens=PROMPT_TOKENS, response_tokens=RESPONSE_TOKENS
        )
    )
    return lambda: trainer.update(batches)


def make_policy(folder: Path, tp: int) -> Any:
    """The policy of a model at a layout, in float32; every rank calls it, in one world."""
    from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
    from megatron_rl.megatron.groups import join
    from megatron_rl.parallel.config import ParallelConfig
    from megatron_rl.platforms.base import detect
    from megatron_rl.policy.policy import Policy
    from megatron_rl.weights.families.registry import read_model_config
    from megatron_rl.weights.model_source import find_model

    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    groups = join(detect(), parallel, 1)
    policy = Policy(
        read_model_config(folder),
        ModelConfig(path=str(folder), dtype="float32"),
        parallel,
        OptimizerConfig(),
        groups,
        temperature=1.0,
        run_updates=1000,
    )
    policy.load(find_model(str(folder), "model.path"))
    return policy


def make_trainer(case: Case, folder: Path, *, row_tokens: int) -> tuple[Any, Any]:
    """A trainer, and what makes mini-batches for it of groups; every rank calls both.

    The second takes share_prompts, too.
    """
    import torch

    from megatron_rl.algorithms.algorithm import Algorithm
    from megatron_rl.algorithms.config import AlgorithmConfig
    from megatron_rl.batching.packer import Packer
    from megatron_rl.policy.passes import plan_passes
    from megatron_rl.policy.trainer import Trainer

    policy = make_policy(folder, case.tp)
    groups = policy.groups
    policy.prepare_training()
    algorithm = Algorithm(AlgorithmConfig(preset="grpo"))
    plan = plan_passes(algorithm, num_updates=1, epochs=1)
    trainer = Trainer(policy, algorithm, plan, lambda _: None, epochs=1, reference=None)

    def pack(made: Sequence[RolloutGroup], *, share_prompts: bool = False) -> list[MiniBatch]:
        packer = Packer(
            groups,
            algorithm,
            row_tokens=row_tokens,
            row_multiple=1,
            max_response_tokens=1 << 20,
            dtype=torch.float32,
            share_prompts=share_prompts,
        )
        own = made if groups.rank == 0 else []
        update_of = {group.prompt.group_id: 0 for group in made}
        selection = algorithm.select(own, update_of=update_of, seed=(0,))
        return trainer.add_advantages(trainer.add_logprobs(packer.pack(selection, 1)))

    return trainer, pack


def report(told: dict[str, Seconds]) -> list[str]:
    """A table: a line per case and variant, each compared with the first variant."""
    lines = [
        "| case | variant | seconds | least | ratio | quartiles |",
        "|---|---|---|---|---|---|",
    ]
    for case, of_variant in told.items():
        first = next(iter(of_variant.values()))
        for name, seconds in of_variant.items():
            ratios = [own / other for own, other in zip(seconds, first, strict=True)]
            low, middle, high = quantiles(ratios, method="inclusive")
            lines.append(
                f"| {case} | {name} | {median(seconds):.3f} | {min(seconds):.3f} | {middle:.3f} | "
                f"{low:.3f} to {high:.3f} |"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--variant", nargs=3, action="append", default=[], metavar=("NAME", "PYTHON", "PATHS")
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank-of", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of:
        run_rank(CASES[options.rank_of], options.models)
        return
    told: dict[str, Seconds] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for case in options.case or CASES:
            told[case] = measure(options.variant, case, Path(folder), options.turns)
            print("\n".join(report({case: told[case]})), flush=True)
    if options.output:
        options.output.write_text("\n".join(report(told)) + "\n")


if __name__ == "__main__":
    main()
