"""Average@k on held-out problems, through the same engine and verifier as training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from megatron_rl.evaluation.config import BenchmarkConfig, EvaluationConfig
from megatron_rl.parallel.collectives import all_gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.reward.scorer import RewardScorer, attach
from megatron_rl.rollout.sampler import Sampler, SamplingPlan
from megatron_rl.types import Prompt, RolloutGroup, Verdict


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What became of one problem; plain values, so that ranks can gather and files hold it."""

    number: int  # row of the benchmark's file
    answer: str
    responses: tuple[str, ...]
    verdicts: tuple[str, ...]
    tokens: tuple[int, ...]
    truncated: int

    @property
    def num_correct(self) -> int:
        return self.verdicts.count(Verdict.CORRECT)


def average_at_k(problems: Sequence[Problem]) -> float:
    """Mean over problems of the share of right responses."""
    return sum(p.num_correct / len(p.verdicts) for p in problems) / len(problems)


def pass_at_k(problems: Sequence[Problem], k: int) -> float:
    """Mean chance that one of k responses is right, unbiased from n >= k (Chen et al. 2021,
    arXiv:2107.03374, eq. 1).
    """
    return sum(
        1 - comb(len(p.verdicts) - p.num_correct, k) / comb(len(p.verdicts), k) for p in problems
    ) / len(problems)


class Evaluator:
    """The benchmarks of a run."""

    def __init__(
        self,
        config: EvaluationConfig,
        problems: Mapping[str, Sequence[Prompt]],
        *,
        max_response_tokens: int,
        output_dir: Path,
        groups: Groups,
    ) -> None:
        self._config, self._output_dir, self._groups = config, output_dir, groups
        self._max_response_tokens = config.max_response_tokens or max_response_tokens
        self._problems = problems

    def run(
        self, sampler: Sampler, scorer: RewardScorer, *, iteration: int, policy_version: int
    ) -> dict[str, float]:
        """Metrics of every benchmark, equal on all ranks; every rank calls it.

        Seeds do not depend on the iteration, so two evaluations differ by the policy alone. The
        responses of each problem are written to evaluation/<benchmark>_<iteration>.jsonl.
        """
        values: dict[str, float] = {}
        for name, prompts in self._problems.items():
            plan = SamplingPlan(
                purpose=f"evaluation/{name}",
                group_size=self._config.samples,
                temperature=self._config.temperature,
                max_response_tokens=self._max_response_tokens,
            )
            groups = sampler.generate(
                prompts, plan, iteration=0, policy_version=policy_version, grader=scorer
            )
            own = [_problem(group) for group in attach(groups, scorer.collect())]
            everywhere = all_gather_objects(own, self._groups.host)
            problems = sorted(
                (problem for part in everywhere for problem in part), key=lambda p: p.number
            )
            values |= self._metrics(name, problems)
            if self._groups.is_main:
                self._write(name, iteration, problems)
        return values

    def _metrics(self, name: str, problems: Sequence[Problem]) -> dict[str, float]:
        k, prefix = self._config.samples, f"evaluation/{name}"
        responses = k * len(problems)
        return {
            f"{prefix}/average_at_{k}": average_at_k(problems),
            f"{prefix}/pass_at_{k}": pass_at_k(problems, k),
            f"{prefix}/truncated_frac": sum(p.truncated for p in problems) / responses,
            f"{prefix}/response_tokens_mean": sum(sum(p.tokens) for p in problems) / responses,
        }

    def _write(self, name: str, iteration: int, problems: Sequence[Problem]) -> None:
        directory = self._output_dir / "evaluation"
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / f"{name}_{iteration:06d}.jsonl").open("w", encoding="utf-8") as file:
            for problem in problems:
                row = {
                    "number": problem.number,
                    "answer": problem.answer,
                    "num_correct": problem.num_correct,
                    "verdicts": problem.verdicts,
                    "tokens": problem.tokens,
                    "responses": problem.responses,
                }
                file.write(json.dumps(row) + "\n")


def load_problems(
    benchmark: BenchmarkConfig, prompts: PromptsConfig, tokenizer: Tokenizer
) -> list[Prompt]:
    """The problems of one benchmark, through the template of the training prompts."""
    config = prompts.model_copy(
        update={
            "path": benchmark.path,
            "split": benchmark.split,
            "prompt_key": benchmark.prompt_key,
            "answer_key": benchmark.answer_key,
            "overlong": "error",  # a benchmark with fewer problems is another benchmark
            "shuffle": False,
        }
    )
    loaded = PromptStream(config, tokenizer, seed=0).all_prompts()
    return loaded[: benchmark.max_problems]


def _problem(group: RolloutGroup) -> Problem:
    return Problem(
        number=group.prompt.group_id,
        answer=group.prompt.answer,
        responses=tuple(rollout.text for rollout in group.rollouts),
        verdicts=tuple(str(rollout.verdict) for rollout in group.rollouts),
        tokens=tuple(len(rollout.response_tokens) for rollout in group.rollouts),
        truncated=sum(rollout.finish_reason == "length" for rollout in group.rollouts),
    )
