"""The measures of an evaluation: means over questions, with bootstrap confidence intervals."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from megatron_rl.evaluation.question import Question
from megatron_rl.types import Verdict

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

TRUNCATED = "truncated_frac"
OF_VERDICTS = {verdict: f"{verdict}_frac" for verdict in Verdict if verdict is not Verdict.CORRECT}
"""Verdict -> the measure of its share of the responses; that of correct is average_at_k."""
NO_ANSWER = OF_VERDICTS[Verdict.NO_ANSWER]
TOKENS = "response_tokens_mean"


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean over questions, and the interval in which it would lie with other questions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """The maker of intervals: percentiles over resampled sets of questions."""

    resamples: int
    confidence: float
    seed: int

    def means(self, name: str, scores: Array) -> Array:
        """Means over questions drawn with replacement: [questions, M] -> [resamples, M].

        name: the benchmark's. The draws depend on it and on the seed alone, not on the scores.
        """
        digest = hashlib.blake2b(f"{self.seed}/bootstrap/{name}".encode(), digest_size=8).digest()
        # RandomState, whose stream is promised never to change.
        random = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        count = len(scores)
        drawn = random.multinomial(count, np.full(count, 1 / count), size=self.resamples)
        means: Array = drawn @ scores / count
        return means

    def interval(self, means: Array) -> tuple[Array, Array]:
        """The lower and the upper end of each column's interval: [resamples, M] -> [M], [M]."""
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail], axis=0)
        return low, high


def pass_chance(correct: int, samples: int, k: int) -> float:
    """The chance that at least one of k responses is right, estimated without bias from
    samples >= k (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    return 1 - comb(samples - correct, k) / comb(samples, k)


def scores(question: Question) -> dict[str, float]:
    """The measures of one question by name; those of a benchmark are their means."""
    count, correct = len(question.verdicts), question.num_correct
    ks = [k for k in (2**power for power in range(1, count)) if k < count]
    measured = {
        f"average_at_{count}": correct / count,
        **{f"pass_at_{k}": pass_chance(correct, count, k) for k in [*ks, count]},
        TRUNCATED: sum(question.truncated) / count,
        **{name: question.verdicts.count(verdict) / count for verdict, name in OF_VERDICTS.items()},
        TOKENS: sum(question.tokens) / count,
    }
    if question.majority is not None:
        measured[f"majority_at_{count}"] = question.majority
    return measured


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """The result on one benchmark."""

    num_questions: int
    verdicts: Mapping[Verdict, int]  # number of responses by verdict, of all five
    num_cut_short: int  # responses without an answer that were cut at the limit
    measured: Mapping[str, Measured]
    means: Array  # [resamples, len(measured)], for the interval of an average over benchmarks

    @property
    def num_failed(self) -> int:
        """The number of responses whose verification failed; they count as not correct."""
        return self.verdicts[Verdict.TIMEOUT] + self.verdicts[Verdict.ERROR]


def measure(name: str, questions: Sequence[Question], bootstrap: Bootstrap) -> BenchmarkResult:
    """The result on a benchmark: means of the measures that all of its questions have."""
    each = [scores(question) for question in questions]
    names = [key for key in each[0] if all(key in one for one in each)]
    table = np.array([[one[key] for key in names] for one in each], dtype=np.float64)
    means = bootstrap.means(name, table)
    return BenchmarkResult(
        num_questions=len(questions),
        verdicts={
            verdict: sum(question.verdicts.count(verdict) for question in questions)
            for verdict in Verdict
        },
        num_cut_short=sum(question.num_cut_short for question in questions),
        measured=_measured(names, table.mean(axis=0), means, bootstrap),
        means=means,
    )


def overall(results: Sequence[BenchmarkResult], bootstrap: Bootstrap) -> dict[str, Measured]:
    """The measures averaged over benchmarks, each benchmark counting the same as any other."""
    names = [name for name in results[0].measured if all(name in r.measured for r in results)]
    values = np.array([[result.measured[name].value for name in names] for result in results])
    means = [
        result.means[:, [list(result.measured).index(name) for name in names]] for result in results
    ]
    return _measured(names, values.mean(axis=0), np.mean(means, axis=0), bootstrap)


def _measured(
    names: Sequence[str], values: Array, means: Array, bootstrap: Bootstrap
) -> dict[str, Measured]:
    low, high = bootstrap.interval(means)
    columns = zip(names, values.tolist(), low.tolist(), high.tolist(), strict=True)
    return {name: Measured(value, lower, upper) for name, value, lower, upper in columns}
