"""Held-out problems through the same engine and verifier as training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rl.evaluation.config import BenchmarkConfig, EvaluationConfig
from megatron_rl.evaluation.measures import Bootstrap, measure, overall
from megatron_rl.evaluation.problem import Problem, to_problem
from megatron_rl.evaluation.report import Evaluation, write_problems, write_summary
from megatron_rl.evaluation.votes import Equality, majority
from megatron_rl.parallel.collectives import all_gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.prompts.config import PromptsConfig
from megatron_rl.prompts.dataset import PromptStream
from megatron_rl.prompts.tokenizer import Tokenizer
from megatron_rl.types import Draw, Prompt, RolloutGroup

Drawn = Callable[[Sequence[Prompt], Draw], list[RolloutGroup]]
"""Samples and grades; this rank's groups of the batch, each group being on one rank."""


class Evaluator:
    """The benchmarks of a run."""

    def __init__(
        self,
        config: EvaluationConfig,
        problems: Mapping[str, Sequence[Prompt]],
        *,
        max_response_tokens: int,
        model: str,
        seed: int,
        equality: Equality,
        output_dir: Path,
        groups: Groups,
    ) -> None:
        """model: its name, for the record. equality: of answers that vote."""
        self._config, self._groups, self._equality = config, groups, equality
        self._directory = output_dir / "evaluation"
        self._max_response_tokens = config.max_response_tokens or max_response_tokens
        self._model, self._seed = model, seed
        self._problems = problems

    def run(self, drawn: Drawn, *, iteration: int | None, policy_version: int) -> Evaluation:
        """The result on every benchmark, equal on all ranks; every rank calls it.

        In evaluation/, <benchmark>_<iteration>.jsonl gets the responses to each problem, and
        summary_<iteration>.json the result; without an iteration the names have none.
        """
        if not self._problems:
            return Evaluation.empty()
        suffix = "" if iteration is None else f"_{iteration:06d}"
        bootstrap = Bootstrap(
            resamples=self._config.resamples, confidence=self._config.confidence, seed=self._seed
        )
        results = {}
        for name, prompts in self._problems.items():
            problems = self._sample(name, prompts, drawn)
            results[name] = measure(name, problems, bootstrap)
            if self._groups.is_main:
                write_problems(problems, self._directory / f"{name}{suffix}.jsonl")
        evaluation = Evaluation(
            samples=self._config.samples,
            confidence=self._config.confidence,
            benchmarks=results,
            overall=overall(list(results.values()), bootstrap) if len(results) > 1 else {},
        )
        if self._groups.is_main:
            setting = {
                "model": self._model,
                "iteration": iteration,
                "policy_version": policy_version,
                "seed": self._seed,
                "temperature": self._config.temperature,
                "max_response_tokens": self._max_response_tokens,
            }
            summary = setting | evaluation.to_json()
            write_summary(summary, self._directory / f"summary{suffix}.json")
        return evaluation

    def _sample(self, name: str, prompts: Sequence[Prompt], drawn: Drawn) -> list[Problem]:
        """The problems of a benchmark in its order, on all ranks."""
        draw = Draw(
            purpose=f"evaluation/{name}",
            group_size=self._config.samples,
            temperature=self._config.temperature,
            max_response_tokens=self._max_response_tokens,
        )
        own = [to_problem(group) for group in drawn(prompts, draw)]
        voted = [
            replace(problem, majority=chance)
            for problem, chance in zip(own, majority(own, self._equality), strict=True)
        ]
        everywhere = all_gather_objects(voted, self._groups.host)
        return sorted((p for part in everywhere for p in part), key=lambda p: p.number)


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
