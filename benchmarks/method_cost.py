"""What a training step of each method costs, beside GRPO that runs every response.

    python benchmarks/method_cost.py --output benchmarks/results/method_cost.md

One process, one model, the same synthetic groups for all methods: half of them mixed, a quarter all
correct, a quarter all wrong. A step is everything from selection to the optimizer: packing,
old-log-prob, reference and value passes where the method needs them, forward, backward, update; no
sampling. Methods take turns, so that a change of load meets all of them; seconds are medians.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megatron_rl.megatron.enter import enter
from megatron_rl.megatron.groups import join
from megatron_rl.parallel.groups import init_distributed
from megatron_rl.platforms.base import detect

PLATFORM = detect()
enter(PLATFORM)  # before the first import of megatron.core

import torch  # noqa: E402
from measure import describe_machine  # noqa: E402
from synthetic import SIZES, synthetic_groups  # noqa: E402

from megatron_rl.algorithms.algorithm import Algorithm  # noqa: E402
from megatron_rl.algorithms.config import AlgorithmConfig  # noqa: E402
from megatron_rl.batching.packer import Packer  # noqa: E402
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig  # noqa: E402
from megatron_rl.parallel.config import ParallelConfig  # noqa: E402
from megatron_rl.parallel.groups import Groups  # noqa: E402
from megatron_rl.policy.critic import Critic  # noqa: E402
from megatron_rl.policy.passes import plan_passes  # noqa: E402
from megatron_rl.policy.policy import Policy  # noqa: E402
from megatron_rl.policy.trainer import Trainer  # noqa: E402
from megatron_rl.weights.families.registry import read_model_config  # noqa: E402
from megatron_rl.weights.model_source import find_model  # noqa: E402

GROUPS, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 32, 96
REWARDS = ((1.0, -1.0, -1.0, 1.0), (1.0,) * 4, (-1.0, 1.0, -1.0, -1.0), (-1.0,) * 4)
BASE = "grpo, nothing dropped"
METHODS: dict[str, dict[str, Any]] = {
    BASE: {"preset": "grpo", "drop_zero_advantage": False},
    "grpo": {"preset": "grpo"},
    "reinforce": {"preset": "reinforce"},
    "reinforce_remove_all_wrong": {"preset": "reinforce_remove_all_wrong"},
    "reinforce_rej": {"preset": "reinforce_rej"},
    "raft_pp": {"preset": "raft_pp"},
    "raft": {"preset": "raft"},
    "iterative_dpo": {"preset": "iterative_dpo"},
    "ppo": {"preset": "ppo"},
    "ppo, KL in the reward": {"preset": "ppo", "kl_reward_coef": 0.001},
}


class Bench:
    """One model and its groups; a method at a time."""

    def __init__(self, model_dir: Path, num_updates: int) -> None:
        parallel = ParallelConfig()
        self.model = ModelConfig(path=str(model_dir), dtype="float32")
        self.groups: Groups = join(PLATFORM, parallel, 1)
        self.num_updates = num_updates
        optimizer, arch = OptimizerConfig(), read_model_config(model_dir)
        shared = (arch, self.model, parallel, optimizer, self.groups)
        self.policy = Policy(*shared, temperature=1.0, run_updates=1000)
        self.critic = Critic(*shared, run_updates=1000)
        for model in (self.policy, self.critic):
            model.load(find_model(str(model_dir), "model.path"))
            model.prepare_training()
        self.rollouts = synthetic_groups(
            itertools.islice(itertools.cycle(REWARDS), GROUPS),
            prompt_tokens=PROMPT_TOKENS,
            response_tokens=(RESPONSE_TOKENS, RESPONSE_TOKENS),
        )

    def step(self, settings: dict[str, Any]) -> tuple[float, float, int]:
        """(seconds, response tokens trained, responses kept) of one iteration's training."""
        algorithm = Algorithm(AlgorithmConfig(**settings))
        packer = Packer(
            self.groups,
            algorithm,
            row_tokens=2048,
            row_multiple=1,
            max_response_tokens=RESPONSE_TOKENS,
            dtype=torch.float32,
        )
        metrics: dict[str, float] = {}
        trainer = Trainer(
            self.policy,
            algorithm,
            plan_passes(algorithm, num_updates=self.num_updates, epochs=1),
            metrics.update,
            epochs=1,
            reference=self.policy.snapshot(),
            critic=self.critic if algorithm.choice.needs_critic else None,
        )
        update_of = {
            group.prompt.group_id: number * self.num_updates // GROUPS
            for number, group in enumerate(self.rollouts)
        }
        start = time.perf_counter()
        selection = algorithm.select(self.rollouts, update_of=update_of, seed=(0,))
        batches = trainer.add_logprobs(packer.pack(selection, self.num_updates))
        trainer.update(trainer.add_advantages(batches))
        seconds = time.perf_counter() - start
        return seconds, metrics["policy/trained_tokens"], len(selection.samples)


def write_model(folder: Path) -> Path:
    """A random Qwen2 of 5 million parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**SIZES)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def report(rows: dict[str, list[tuple[float, float, int]]], num_updates: int) -> list[str]:
    """A table; the first method is what the others are compared with."""
    machine = ", ".join(f"{name} {value}" for name, value in describe_machine("cpu").items())
    lines = [
        "# What a training step of each method costs",
        "",
        f"`python benchmarks/method_cost.py --updates {num_updates}`: {GROUPS} groups of 4 "
        f"responses of {RESPONSE_TOKENS} tokens, half of the groups mixed, {num_updates} updates "
        f"an iteration; medians of {len(rows[BASE])}. {machine}.",
        "",
        "| method | responses | tokens trained | ratio | seconds | ratio |",
        "|---|---|---|---|---|---|",
    ]
    base_seconds, base_tokens = median(row[0] for row in rows[BASE]), rows[BASE][0][1]
    for name, measured in rows.items():
        seconds = median(row[0] for row in measured)
        _, tokens, kept = measured[0]
        lines.append(
            f"| {name} | {kept} | {tokens:,.0f} | {tokens / base_tokens:.2f} | {seconds:.2f} | "
            f"{seconds / base_seconds:.2f} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of an iteration")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    init_distributed(PLATFORM)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(write_model(Path(folder)), options.updates)
    rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in METHODS}
    for repeat in range(options.repeats + 1):
        for name, settings in METHODS.items():
            measured = bench.step(settings)
            if repeat:  # the first one warms up
                rows[name].append(measured)
    text = "\n".join(report(rows, options.updates)) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
