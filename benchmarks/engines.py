"""Engines take turns: the policy itself against vLLM, iteration by iteration, on one machine.

    python benchmarks/engines.py --ranks 1 --iterations 12

Each engine is started once, with the same recipe, and then waits at a gate before every iteration.
One goes through at a time, while the other stands still. Seconds of an iteration are the
conductor's: from the gate's opening to the last rank's arrival at the next one. Rewards are given
by the place in the group, so that no group is dropped, whatever an untrained model says; the
learning rate is so small that both sample from the same policy all the time.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launched import make_model, recipe_of, start
from measure import describe_machine

GATES = "MEGATRON_RL_BENCHMARK_GATES"
ENGINES = ("vllm", "megatron")
PHASES = ("rollout", "reward", "logprob", "update", "weight_sync")
TICK_S = 0.002


def main() -> None:
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="engines-"))
    model = options.model or make_model(folder / "model")
    runs = {name: _Run(name, options, model, folder) for name in ENGINES}
    try:
        for run in runs.values():
            run.arrive(0)  # one after the other: a start has the machine to itself, too
        for iteration in range(1, options.iterations + 2):  # the first one is not counted
            for run in runs.values():
                run.go(iteration)
    finally:
        for run in runs.values():
            run.end()
    print(json.dumps(describe_machine("cpu")))
    print("engine | start-up s | iteration s (min) | " + " | ".join(PHASES) + " | peak MiB a rank")
    for run in runs.values():
        print(run.line())
    ratios = [
        theirs / ours
        for theirs, ours in zip(runs["vllm"].seconds[1:], runs["megatron"].seconds[1:], strict=True)
    ]
    print(f"iteration, vllm / megatron: median of turns {statistics.median(ratios):.2f}")


class _Run:
    """One engine's run, which starts with it."""

    def __init__(self, name: str, options: argparse.Namespace, model: Path, folder: Path) -> None:
        self.name, self.ranks = name, options.ranks
        self.gates = folder / f"{name}.gates"
        self.gates.mkdir()
        self.log = folder / f"{name}.log"
        self.seconds: list[float] = []
        self.recipe = recipe_of(
            Path(model),
            folder / name,
            options.iterations + 1,
            prompts={"prompts_per_iteration": options.prompts},
            rollout={
                "engine": name,
                "group_size": 8,
                "max_response_tokens": options.response_tokens,
            },
            algorithm={"preset": "grpo"},
            optimizer={"lr": 1e-12, "prompts_per_update": options.prompts // 2},
            checkpoint={"save_every": 0},
            parallel=dict(part.split("=") for part in options.parallel),
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start_s = 0.0

    def arrive(self, iteration: int) -> None:
        """Wait until all ranks stand at the gate behind this iteration."""
        if self.process is None:
            began = time.monotonic()
            os.environ[GATES] = str(self.gates)
            self.process = start(
                self.recipe, self.ranks, self.log, mark=self.name, program=(__file__,)
            )
        while any(not (self.gates / f"{rank}.{iteration}").exists() for rank in range(self.ranks)):
            if self.process.poll() is not None:
                sys.exit(self.log.read_text()[-4000:])
            time.sleep(TICK_S)
        if iteration == 0:
            self.start_s = time.monotonic() - began

    def go(self, iteration: int) -> None:
        began = time.monotonic()
        (self.gates / f"go.{iteration}").touch()
        self.arrive(iteration)
        self.seconds.append(time.monotonic() - began)

    def end(self) -> None:
        """Wait until it has ended; where a gate is missing, end it."""
        if self.process is None:
            return
        if len(self.seconds) < self.recipe["run"]["num_iterations"]:
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(120)

    def line(self) -> str:
        """Medians without the first iteration."""
        metrics = Path(self.recipe["run"]["output_dir"]) / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
        peaks = [int((self.gates / f"{rank}.peak").read_text()) for rank in range(self.ranks)]
        phases = [
            statistics.median(record.get(f"time/{phase}_s", 0.0) for record in records)
            for phase in PHASES
        ]
        seconds = self.seconds[1:]
        return (
            f"{self.name} | {self.start_s:.1f} | {statistics.median(seconds):.3f} "
            f"({min(seconds):.3f}) | "
            + " | ".join(f"{value:.3f}" for value in phases)
            + f" | {max(peaks) // 1024}"
        )


def run_behind_gates() -> None:
    """What a rank of a started run does."""
    from megatron_rl.megatron.enter import enter
    from megatron_rl.platforms.base import detect

    enter(detect())
    import megatron_rl.loop as loop
    import megatron_rl.rollout.sampled as sampled
    from megatron_rl.commands.main import main as command

    gates, rank = Path(os.environ[GATES]), os.environ.get("RANK", "0")
    run_iteration, attach = loop.run_iteration, sampled.attach

    def gated(run: Any, iteration: int) -> bool:
        peak = next(
            line.split()[1]
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        (gates / f"{rank}.peak").write_text(peak)
        (gates / f"{rank}.{iteration - 1}").touch()
        while not (gates / f"go.{iteration}").exists():
            time.sleep(TICK_S)
        run.meter.restart()
        goes_on = run_iteration(run, iteration)
        if iteration == run.config.run.num_iterations:
            (gates / f"{rank}.{iteration}").touch()
        return goes_on

    def by_place(groups: Any, *rest: Any) -> Any:
        return [
            replace(
                group,
                rollouts=tuple(
                    replace(rollout, reward=1.0 if index % 2 else -1.0)
                    for index, rollout in enumerate(group.rollouts)
                ),
            )
            for group in attach(groups, *rest)
        ]

    loop.run_iteration, sampled.attach = gated, by_place
    sys.exit(command())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face directory; else the quickstart's"
    )
    parser.add_argument("--parallel", nargs="*", default=[], help="SIZE=N of the section parallel")
    return parser.parse_args()


if __name__ == "__main__":
    if GATES in os.environ:
        run_behind_gates()
    else:
        main()
