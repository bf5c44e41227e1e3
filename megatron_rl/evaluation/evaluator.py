"""Evaluation: held-out questions go through the same engine and verifier as training."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rl.errors import RunError
from megatron_rl.evaluation.config import EvaluationConfig
from megatron_rl.evaluation.measures import Bootstrap, measure, overall
from megatron_rl.evaluation.question import Question, to_question
from megatron_rl.evaluation.report import Evaluation, write_questions, write_summary
from megatron_rl.evaluation.votes import Equality, majority
from megatron_rl.parallel.collectives import all_gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.prompts.rows import MAX_SHOWN
from megatron_rl.types import Draw, Prompt, RolloutGroup

Drawn = Callable[[Sequence[Prompt], Draw], list[RolloutGroup] | None]
"""Samples and grades; this rank's groups of the batch, each group being on one rank. None on all
ranks: it was broken off."""


class Evaluator:
    """Evaluates the policy on the benchmarks of a run."""

    def __init__(
        self,
        config: EvaluationConfig,
        questions: Mapping[str, Sequence[Prompt]],
        *,
        max_response_tokens: int,
        model: str,
        seed: int,
        asked: Mapping[str, object],
        equality: Equality,
        output_dir: Path,
        groups: Groups,
    ) -> None:
        """Args:
        questions: prompts by benchmark.
        model: its name, for the record.
        asked: how questions become prompts, for the record.
        equality: for votes.
        """
        self._config, self._groups, self._equality = config, groups, equality
        self._directory = output_dir / "evaluation"
        self._max_response_tokens = config.max_response_tokens or max_response_tokens
        self._model, self._seed, self._asked = model, seed, asked
        self._questions = questions

    def run(self, drawn: Drawn, *, iteration: int | None, policy_version: int) -> Evaluation | None:
        """The result on every benchmark, equal on all ranks; every rank calls it.

        None where drawn was broken off.

        In evaluation/, <benchmark>_<iteration>.jsonl gets the responses to each question, and
        summary_<iteration>.json the result; without an iteration the names have none.

        Raises:
            RunError: on all ranks, if questions or responses were lost.
        """
        if not self._questions:
            return Evaluation.empty()
        suffix = "" if iteration is None else f"_{iteration:06d}"
        bootstrap = Bootstrap(
            resamples=self._config.resamples, confidence=self._config.confidence, seed=self._seed
        )
        results = {}
        for name, prompts in self._questions.items():
            answered = self._sample(name, prompts, drawn)
            if answered is None:
                return None
            results[name] = measure(name, answered, bootstrap)
            if self._groups.is_main:
                write_questions(answered, self._directory / f"{name}{suffix}.jsonl")
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
                "top_p": self._config.top_p,
                "top_k": self._config.top_k,
                "max_response_tokens": self._max_response_tokens,
                "prompts": self._asked,
            }
            summary = setting | evaluation.to_json()
            write_summary(summary, self._directory / f"summary{suffix}.json")
        return evaluation

    def _sample(self, name: str, prompts: Sequence[Prompt], drawn: Drawn) -> list[Question] | None:
        """The questions of a benchmark with their responses, in its order, on all ranks."""
        draw = Draw(
            purpose=f"evaluation/{name}",
            group_size=self._config.samples,
            temperature=self._config.temperature,
            max_response_tokens=self._max_response_tokens,
            top_k=self._config.top_k,
            top_p=self._config.top_p,
        )
        groups = drawn(prompts, draw)
        if groups is None:
            return None
        own = [to_question(group) for group in groups]
        voted = [
            replace(question, majority=chance)
            for question, chance in zip(own, majority(own, self._equality), strict=True)
        ]
        everywhere = all_gather_objects(voted, self._groups.world)
        answered = sorted((q for part in everywhere for q in part), key=lambda q: q.number)
        _check_complete(name, answered, prompts, self._config.samples)
        return answered


def _check_complete(
    name: str, answered: Sequence[Question], prompts: Sequence[Prompt], samples: int
) -> None:
    """Refuse to measure a benchmark of which questions or responses were lost, on all ranks."""
    full = Counter(q.number for q in answered if len(q.responses) == samples)
    lost = [prompt.group_id for prompt in prompts if full[prompt.group_id] != 1]
    if not lost:
        return
    first = ", ".join(map(str, lost[:MAX_SHOWN]))
    raise RunError(
        f"evaluation.benchmarks.{name}: {len(lost)} of {len(prompts)} questions did not come back "
        f"once with {samples} responses each (the first, counted from 0: {first}), so the result "
        "would be of another benchmark, and there is none. The engine has lost requests, which no "
        "setting asks for: start the same command again"
    )
