"""Rewards of responses: scoring starts when a response is finished, while others still generate."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_rl.errors import InputError, RunError
from megatron_rl.reward.answers import Pair
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.math_grader import grade
from megatron_rl.reward.pool import Outcome, WorkerPool
from megatron_rl.types import RolloutGroup, Verdict

Key = tuple[int, int]
"""(prompt.group_id, position of the response in its group)."""

_DUMMY = ("The answer is \\boxed{0}.", "0")
_MAX_FAILURES = 8


@dataclass(frozen=True)
class Score:
    """The verdict on one response and what it earns."""

    verdict: Verdict
    reward: float
    extracted: str | None  # the answer found in the response, None without one
    seconds: float  # CPU time of its verification


class RewardScorer:
    """Verifies responses in worker processes; one per rank."""

    def __init__(self, config: RewardConfig) -> None:
        """Start the workers; with a user's function, wait until it has been loaded and called.

        Raises InputError when the function cannot be used.
        """
        self._config = config
        self._scores: dict[Key, Score] = {}
        self._submitted: set[Key] = set()
        # Rollouts of a prompt repeat each other: equal pairs are compared once per iteration.
        self._jobs: dict[Pair, int] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._claims: dict[int, list[tuple[Key, str | None]]] = {}
        self._num_jobs = 0
        self.failures: list[str] = []
        """The first timeouts and errors since the last collect, one line each."""
        self._pool = WorkerPool(
            num_workers=config.num_workers,
            deadline_s=config.deadline_s,
            memory_bytes=config.memory_mib << 20,
            function=config.function_path,
        )
        if config.function_path is not None:
            self._try_function()

    def submit(self, key: Key, response_text: str, answer: str) -> None:
        """Start scoring a response; never waits."""
        if key in self._submitted:
            raise ValueError(f"response {key} was submitted twice; a key names one response")
        if not self._submitted:
            self.failures = []
        self._submitted.add(key)
        if self._config.function_path is not None:
            self._claim(self._new_job(response_text, answer), key, None)
            return
        started = time.perf_counter()
        graded = grade(response_text, answer)
        if graded.verdict is None:
            assert graded.pair is not None
            job = self._jobs.get(graded.pair)
            if job is None:
                job = self._jobs[graded.pair] = self._new_job(*graded.pair)
            self._claim(job, key, graded.extracted)
            return
        outcome = Outcome(graded.verdict, time.perf_counter() - started, reason="no gold answer")
        self._scores[key] = self._score(key, graded.extracted, outcome)

    def poll(self) -> None:
        """Hand out and take in work without waiting; to be called between engine steps."""
        self._advance(0.0)

    def collect(self) -> dict[Key, Score]:
        """The scores of everything submitted since the last call; waits for the last of them."""
        while self._claims:
            self._advance(1.0)
        scores = self._scores
        self._scores, self._submitted = {}, set()
        self._jobs, self._outcomes = {}, {}
        return scores

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def _new_job(self, left: str, right: str) -> int:
        self._num_jobs += 1
        self._claims[self._num_jobs] = []
        self._pool.submit(self._num_jobs, left, right)
        return self._num_jobs

    def _claim(self, job: int, key: Key, extracted: str | None) -> None:
        if job in self._outcomes:
            self._scores[key] = self._score(key, extracted, self._outcomes[job])
        else:
            self._claims[job].append((key, extracted))

    def _advance(self, wait_s: float) -> None:
        for job, outcome in self._pool.poll(wait_s):
            self._outcomes[job] = outcome
            for key, extracted in self._claims.pop(job):
                self._scores[key] = self._score(key, extracted, outcome)

    def _score(self, key: Key, extracted: str | None, outcome: Outcome) -> Score:
        if outcome.verdict is None and outcome.reward is not None:
            is_correct = outcome.reward >= self._config.correct
            verdict = Verdict.CORRECT if is_correct else Verdict.WRONG
            return Score(verdict, outcome.reward, extracted, outcome.seconds)
        verdict = Verdict(outcome.verdict or Verdict.ERROR)
        if verdict in (Verdict.TIMEOUT, Verdict.ERROR) and len(self.failures) < _MAX_FAILURES:
            answer = "" if extracted is None else f", answer {extracted!r}"
            self.failures.append(f"response {key}{answer}: {verdict}, {outcome.reason}")
        return Score(verdict, self._reward(verdict), extracted, outcome.seconds)

    def _reward(self, verdict: Verdict) -> float:
        return self._config.correct if verdict is Verdict.CORRECT else self._config.wrong

    def _try_function(self) -> None:
        """Call the user's function once; what it says of a dummy is only judged by its type."""
        try:
            self._pool.submit(0, *_DUMMY)
            while not (finished := self._pool.poll(1.0)):
                pass
        except (InputError, RunError):
            self._pool.close()
            raise
        outcome = finished[0][1]
        if outcome.is_misuse:
            self._pool.close()
            raise InputError(
                f"reward.function={self._config.function_path!r}: called with a dummy response and "
                f"answer it {outcome.reason}. It must return a bool or a float for any two strings"
            )


def attach(groups: Sequence[RolloutGroup], scores: Mapping[Key, Score]) -> list[RolloutGroup]:
    """The groups with reward and verdict filled in.

    A response whose verification failed gets no reward: it is counted, and never trained on.
    """
    attached = []
    for group in groups:
        rollouts = []
        for index, rollout in enumerate(group.rollouts):
            score = scores[group.prompt.group_id, index]
            failed = score.verdict in (Verdict.TIMEOUT, Verdict.ERROR)
            reward = None if failed else score.reward
            rollouts.append(
                replace(rollout, reward=reward, verdict=score.verdict, extracted=score.extracted)
            )
        attached.append(replace(group, rollouts=tuple(rollouts)))
    return attached


def check_failures(
    counts: Mapping[Verdict, int], config: RewardConfig, examples: Sequence[str] = ()
) -> None:
    """Raise RunError when too many verifications failed; counts are sums over all ranks."""
    num_timeouts, num_errors = counts.get(Verdict.TIMEOUT, 0), counts.get(Verdict.ERROR, 0)
    total = sum(counts.values())
    if num_timeouts + num_errors <= config.max_failure_frac * total:
        return
    share = (num_timeouts + num_errors) / total
    first = "".join(f"\n  {example}" for example in examples)
    raise RunError(
        f"reward: {num_timeouts} timeouts and {num_errors} errors in {total} responses "
        f"({share:.1%}): at most reward.max_failure_frac={config.max_failure_frac} is allowed, "
        "since nothing is learned from these responses whatever they say. Raise "
        "reward.deadline_s or reward.memory_mib if the verifier needs more, mend it if it raises, "
        f"or raise reward.max_failure_frac{first}"
    )
