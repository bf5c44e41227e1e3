"""What is measured: means over problems, with bootstrap confidence intervals."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from megatron_rl.evaluation.problem import Problem

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

TRUNCATED = "truncated_frac"
TOKENS = "response_tokens_mean"


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean over problems, and where it would lie had other problems been drawn."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are made: percentiles over resampled sets of problems."""

    resamples: int
    confidence: float
    seed: int

    def means(self, name: str, scores: Array) -> Array:
        """Means over problems drawn with replacement: [problems, M] -> [resamples, M].

        The draws depend on the seed and the name alone, not on the scores.
        """
        digest = hashlib.blake2b(f"{self.seed}/bootstrap/{name}".encode(), digest_size=8).digest()
        # RandomState, whose stream is promised never to change.
        random = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        count = len(scores)
        drawn = random.multinomial(count, np.full(count, 1 / count), size=self.resamples)
        means: Array = drawn @ scores / count
        return means

    def interval(self, means: Array) -> tuple[Array, Array]:
        """Lower and upper end of each column: [resamples, M] -> [M], [M]."""
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail], axis=0)
        return low, high


def pass_chance(correct: int, samples: int, k: int) -> float:
    """Chance that one of k responses is right, unbiased from samples >= k (Chen et al. 2021,
    arXiv:2107.03374, eq. 1).
    """
    return 1 - comb(samples - correct, k) / comb(samples, k)


def scores(problem: Problem) -> dict[str, float]:
    """The measures of one problem; a benchmark's are their means."""
    count, correct = len(problem.verdicts), problem.num_correct
    ks = [k for k in (2**power for power in range(1, count)) if k < count]
    measured = {
        f"average_at_{count}": correct / count,
        **{f"pass_at_{k}": pass_chance(correct, count, k) for k in [*ks, count]},
        TRUNCATED: sum(problem.truncated) / count,
        TOKENS: sum(problem.tokens) / count,
    }
    if problem.majority is not None:
        measured[f"majority_at_{count}"] = problem.majority
    return measured


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """One benchmark."""

    num_problems: int
    num_failed: int  # responses whose verification failed
    measured: Mapping[str, Measured]
    means: Array  # [resamples, len(measured)], for the interval of an average over benchmarks


def measure(name: str, problems: Sequence[Problem], bootstrap: Bootstrap) -> BenchmarkResult:
    """The means over a benchmark's problems, those that every problem has."""
    each = [scores(problem) for problem in problems]
    names = [key for key in each[0] if all(key in one for one in each)]
    table = np.array([[one[key] for key in names] for one in each], dtype=np.float64)
    means = bootstrap.means(name, table)
    return BenchmarkResult(
        num_problems=len(problems),
        num_failed=sum(problem.num_failed for problem in problems),
        measured=_measured(names, table.mean(axis=0), means, bootstrap),
        means=means,
    )


def overall(results: Sequence[BenchmarkResult], bootstrap: Bootstrap) -> dict[str, Measured]:
    """Every benchmark's measures averaged, each benchmark counting the same as any other."""
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
