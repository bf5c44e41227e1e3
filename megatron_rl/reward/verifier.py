"""A verifier computes one reward: a judge grades at once, and workers do what it leaves open."""

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from megatron_rl.errors import InputError, RunError
from megatron_rl.reward.extract import OPEN_THOUGHT
from megatron_rl.reward.kinds import Judge
from megatron_rl.reward.math_grader import VerdictName
from megatron_rl.reward.pool import Outcome, WorkerPool

_DUMMY = ("The answer is \\boxed{0}.", "0")


@dataclass(frozen=True, slots=True)
class Result:
    """One reward's result on one response: a verdict, or a value alone."""

    extracted: str | None
    seconds: float  # CPU time
    verdict: VerdictName | None = None
    value: float | None = None
    reason: str | None = None  # why there was a timeout or an error

    @property
    def has_failed(self) -> bool:
        return self.verdict in ("timeout", "error")

    @property
    def points(self) -> float:
        """The value; without one, 1 for a right answer and 0 for any other."""
        return float(self.verdict == "correct") if self.value is None else self.value


class Verifier:
    """Computes one reward of many responses, each known by a key; never waits in `submit`."""

    def __init__(self, judge: Judge | None, pool: WorkerPool | None) -> None:
        """judge: grades at once; None for a user's function. pool: does what judge leaves open."""
        self._judge, self._pool = judge, pool
        self._results: dict[Hashable, Result] = {}
        # Rollouts of a prompt repeat each other: equal pairs are one job until `take`.
        self._jobs: dict[tuple[str, str], int] = {}
        self._outcomes: dict[int, Outcome] = {}  # of jobs that have ended
        # Job that has not ended -> (key, extracted answer) of each response that waits for it.
        self._claims: dict[int, list[tuple[Hashable, str | None]]] = {}
        self._num_jobs = 0

    @property
    def is_busy(self) -> bool:
        return bool(self._claims)

    def submit(
        self,
        key: Hashable,
        response: str,
        answer: str,
        num_tokens: int | None,
        *,
        opens_thought: bool = False,
    ) -> None:
        """Grade a response at once, or start a job for it.

        opens_thought: the prompt ended in the tag that opens a thought. A judge reads the response
        behind that tag, a user's function reads it alone.
        """
        if self._judge is None:
            self._claim(self._new_job(response, answer), key, None)
            return
        started = time.thread_time()
        if opens_thought:
            response = OPEN_THOUGHT + response
        graded = self._judge(response, answer, num_tokens)
        if graded.pair is None:
            seconds = time.thread_time() - started
            self._results[key] = Result(
                graded.extracted, seconds, graded.verdict, graded.value, graded.reason
            )
            return
        job = self._jobs.get(graded.pair)
        if job is None:
            job = self._jobs[graded.pair] = self._new_job(*graded.pair)
        self._claim(job, key, graded.extracted)

    def advance(self, wait_s: float) -> None:
        """Hand out and take in work; waits at most wait_s for something to happen."""
        if self._pool is None:
            return
        for job, outcome in self._pool.poll(wait_s):
            self._outcomes[job] = outcome
            for key, extracted in self._claims.pop(job):
                self._results[key] = _result(extracted, outcome)

    def take(self) -> dict[Hashable, Result]:
        """The results of all responses since the last call; the verifier must not be busy."""
        assert not self.is_busy
        results = self._results
        self._results, self._jobs, self._outcomes = {}, {}, {}
        return results

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def _new_job(self, left: str, right: str) -> int:
        assert self._pool is not None
        self._num_jobs += 1
        self._claims[self._num_jobs] = []
        self._pool.submit(self._num_jobs, left, right)
        return self._num_jobs

    def _claim(self, job: int, key: Hashable, extracted: str | None) -> None:
        if job in self._outcomes:
            self._results[key] = _result(extracted, self._outcomes[job])
        else:
            self._claims[job].append((key, extracted))


def try_function(pool: WorkerPool, setting: str, path: str, answers: Sequence[str] = ()) -> None:
    """Call a user's function with dummies, so that one that can give no reward is refused at once.

    One that raises may need what the data hold, and is called with some of their answers: as the
    answer to the dummy response, and as the response to itself.

    Raises:
        InputError: the function cannot be used; the pool is closed.
    """
    tried = [(_DUMMY[0], answer) for answer in answers] + [(answer, answer) for answer in answers]
    try:
        outcome = _called(pool, _DUMMY)
        while outcome.has_raised and not outcome.is_misuse and tried:
            outcome = _called(pool, tried.pop())
    except InputError:
        pool.close()
        raise
    except RunError as error:
        pool.close()
        raise InputError(f"{setting}={path!r}: {error}") from error
    may_be_the_dummy = outcome.has_raised and not answers
    if outcome.is_misuse or (outcome.verdict in ("timeout", "error") and not may_be_the_dummy):
        pool.close()
        what = ", and with answers of the data," if outcome.has_raised and answers else ""
        raise InputError(
            f"{setting}={path!r}: called with a dummy response and answer{what} it gave no reward: "
            f"{outcome.reason}. It must return a bool or a float for any two strings"
        )


def _called(pool: WorkerPool, pair: tuple[str, str]) -> Outcome:
    pool.submit(0, *pair)
    while not (finished := pool.poll(math.inf)):
        pass
    return finished[0][1]


def _result(extracted: str | None, outcome: Outcome) -> Result:
    return Result(extracted, outcome.seconds, outcome.verdict, outcome.reward, outcome.reason)
