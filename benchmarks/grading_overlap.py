"""What grading adds to an iteration when it runs beside generation.

    python benchmarks/grading_overlap.py --data ../shared/data

Real iterations of the training loop on one rank: vLLM, Megatron-Core, a tiny model. What is graded
in place of the model's own words are 16 KiB responses put together from published solutions. Each
second iteration deals out the verdicts without grading; the two kinds take turns.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from grading_data import BENCHMARKS, load_cases
from grading_throughput import MIXES, Response, make_responses
from measure import describe_machine

from megatron_rl.config import load_config
from megatron_rl.megatron.enter import enter
from megatron_rl.parallel.groups import init_distributed
from megatron_rl.platforms.base import detect
from megatron_rl.preflight import read_inputs
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.scorer import Key, RewardScorer, Score
from megatron_rl.types import Verdict

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
RECIPE = """
run: {{output_dir: {folder}/run, num_iterations: 1000}}
model: {{path: {folder}/model, dtype: float32}}
prompts: {{path: {prompts}, prompts_per_iteration: 32, max_prompt_tokens: 16}}
rollout: {{group_size: 8, max_response_tokens: {tokens}}}
algorithm: {{preset: grpo}}
"""


class Dealt:
    """Verdicts without grading: every second response is right."""

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self.failures: list[str] = []
        self.beside = self.after = 0.0  # seconds of the trainer, during and after generation

    def submit(
        self,
        key: Key,
        response_text: str,
        answer: str,
        num_tokens: int,
        *,
        opens_thought: bool,
    ) -> None:
        self._keys.append(key)

    def poll(self) -> None:
        pass

    def collect(self) -> dict[Key, Score]:
        keys, self._keys = self._keys, []
        verdicts = {True: (Verdict.CORRECT, 1.0), False: (Verdict.WRONG, -1.0)}
        return {key: Score(*verdicts[key[1] % 2 == 0], None, 0.0) for key in keys}


class Graded(Dealt):
    """The real scorer on prepared responses."""

    def __init__(self, scorer: RewardScorer, responses: Iterator[Response]) -> None:
        super().__init__()
        self._scorer, self._responses = scorer, responses

    def submit(
        self,
        key: Key,
        response_text: str,
        answer: str,
        num_tokens: int,
        *,
        opens_thought: bool,
    ) -> None:
        started, response = time.perf_counter(), next(self._responses)
        self._scorer.submit(key, response.text, response.gold, num_tokens)
        self.beside += time.perf_counter() - started

    def poll(self) -> None:
        started = time.perf_counter()
        self._scorer.poll()
        self.beside += time.perf_counter() - started

    def collect(self) -> dict[Key, Score]:
        started = time.perf_counter()
        scores = self._scorer.collect()
        self.after += time.perf_counter() - started
        return scores


def measure(
    folder: Path, responses: Iterator[Response], args: argparse.Namespace
) -> dict[str, float]:
    """Medians over iterations with and without grading, and of the trainer's part in it."""
    recipe = folder / "recipe.yaml"
    prompts = QUICKSTART / "data" / "train.jsonl"
    recipe.write_text(RECIPE.format(folder=folder, prompts=prompts, tokens=args.tokens))
    config = load_config(recipe, [])
    platform = detect()
    inputs = read_inputs(config, 1)
    enter(platform)
    init_distributed(platform)

    from megatron_rl.build import build_run
    from megatron_rl.loop import run_iteration

    run = build_run(config, inputs, platform, say=lambda message: None)
    run.rollouts.receive(run.policy)
    scorers = {"dealt": Dealt(), "graded": Graded(RewardScorer(RewardConfig()), responses)}
    sources = {name: replace(run.rollouts, scorer=scorer) for name, scorer in scorers.items()}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in scorers}
    for iteration, name in zip(
        range(1, 2 * args.iterations + 3), itertools.cycle(scorers), strict=False
    ):
        run.rollouts, scorer = sources[name], scorers[name]
        scorer.beside = scorer.after = 0.0
        started = time.perf_counter()
        run_iteration(run, iteration)
        if iteration > 2:  # the first of each kind starts workers and caches
            times[name].append((time.perf_counter() - started, scorer.beside, scorer.after))
    iteration, beside, after = (median(column) for column in zip(*times["graded"], strict=True))
    return {
        "iteration without grading, s": median(each[0] for each in times["dealt"]),
        "iteration with grading, s": iteration,
        "trainer's time in grading while it samples, s": beside,
        "wait for the last verdicts, s": after,
        "share of the iteration": (beside + after) / iteration,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--iterations", type=int, default=10, help="of each kind")
    parser.add_argument("--tokens", type=int, default=200, help="of a response")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    cases = [c for n in next(iter(MIXES.values())) for c in load_cases(BENCHMARKS[n], args.data)]
    responses = make_responses(cases, 256 * (args.iterations + 1), random.Random(0))
    with tempfile.TemporaryDirectory() as folder:
        make_model = [sys.executable, str(QUICKSTART / "make_model.py")]
        subprocess.run([*make_model, "--output", f"{folder}/model"], check=True)
        results = measure(Path(folder), iter(responses), args)
    rounded = {name: round(value, 4) for name, value in results.items()}
    text = json.dumps({"machine": describe_machine("cpu"), **rounded}, indent=2)
    print(text, flush=True)
    if args.output:
        args.output.write_text(text + "\n")
    os._exit(0)  # an engine's destructors wait for ranks that are not there


if __name__ == "__main__":
    main()
