"""Rewards of responses: scoring starts when a response is finished, while others still generate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_rl.errors import RunError
from megatron_rl.reward.checks import is_import_path
from megatron_rl.reward.config import RewardConfig
from megatron_rl.reward.kinds import make_judge
from megatron_rl.reward.pool import WorkerPool
from megatron_rl.reward.verifier import Result, Verifier, try_function
from megatron_rl.types import RolloutGroup, Verdict

Key = tuple[int, int]
"""(prompt.group_id, position of the response in its group)."""

MAX_FAILURES = 8
_SHARED_WAIT_S = 0.02  # how long each verifier may wait in turn, where several are at work


@dataclass(frozen=True)
class Score:
    """The verdict on one response and what it earns."""

    verdict: Verdict
    reward: float
    extracted: str | None  # the answer found in the response, None without one
    seconds: float  # CPU time of its verification, all rewards together
    parts: Mapping[str, float] = field(default_factory=dict)  # values, before their weights
    reason: str | None = None  # why there was a timeout or an error

    @property
    def has_failed(self) -> bool:
        """True where the verification failed, so that the reward means nothing."""
        return self.verdict in (Verdict.TIMEOUT, Verdict.ERROR)


class RewardScorer:
    """Verifies responses in worker processes; one per rank."""

    def __init__(self, config: RewardConfig, answers: Sequence[str] = ()) -> None:
        """Start the workers; a user's function is loaded and called before this returns.

        answers: some of the data, with which a function is tried, too.

        Raises InputError when a function cannot be used.
        """
        self._config = config
        self._submitted: dict[Key, None] = {}  # an ordered set
        self._verifiers: list[Verifier] = []  # first that of the verdict, then one for each part
        self.failures: list[str] = []
        """The first timeouts and errors since the last collect, one line each."""
        parts = [None, *config.parts.values()]
        try:
            for (setting, kind), part in zip(config.kinds.items(), parts, strict=True):
                pool = start_pool(config, setting, kind, answers)
                self._verifiers.append(Verifier(make_judge(kind, config, part), pool))
        except BaseException:
            self.close()
            raise

    def submit(
        self,
        key: Key,
        response_text: str,
        answer: str,
        num_tokens: int | None = None,
        *,
        opens_thought: bool = False,
    ) -> None:
        """Start scoring a response; never waits.

        num_tokens is read by length_penalty alone. opens_thought: the prompt ended in <think>, so
        the response starts inside a thought, and holds an answer only after its </think>. A user's
        function gets the response as it is.
        """
        if key in self._submitted:
            raise ValueError(f"response {key} was submitted twice; a key names one response")
        if not self._submitted:
            self.failures = []
        self._submitted[key] = None
        for verifier in self._verifiers:
            verifier.submit(key, response_text, answer, num_tokens, opens_thought=opens_thought)

    def poll(self) -> None:
        """Hand out and take in work without waiting; called between engine steps."""
        for verifier in self._verifiers:
            verifier.advance(0.0)

    def collect(self) -> dict[Key, Score]:
        """The scores of everything submitted since the last call; waits for the last of them."""
        while busy := [verifier for verifier in self._verifiers if verifier.is_busy]:
            for verifier in busy:
                verifier.advance(1.0 if len(busy) == 1 else _SHARED_WAIT_S)
        results = [verifier.take() for verifier in self._verifiers]
        scores = {key: self._score(key, [each[key] for each in results]) for key in self._submitted}
        self._submitted = {}
        return scores

    def close(self) -> None:
        """End the worker processes."""
        for verifier in self._verifiers:
            verifier.close()

    def _score(self, key: Key, results: Sequence[Result]) -> Score:
        verified, *others = results
        parts = {
            name: _as_part(name, part)
            for name, part in zip(self._config.parts, others, strict=True)
        }
        failure = next(
            (result for result in (verified, *parts.values()) if result.has_failed), None
        )
        verdict = self._verdict(failure or verified)
        reward = self._base_reward(verdict, verified) + sum(
            self._config.parts[name].weight * part.points for name, part in parts.items()
        )
        if failure is not None and len(self.failures) < MAX_FAILURES:
            answer = "" if verified.extracted is None else f", answer {verified.extracted!r}"
            self.failures.append(f"response {key}{answer}: {verdict}, {failure.reason}")
        return Score(
            verdict,
            reward,
            verified.extracted,
            seconds=sum(result.seconds for result in results),
            parts={name: part.points for name, part in parts.items()},
            reason=failure.reason if failure else None,
        )

    def _verdict(self, result: Result) -> Verdict:
        if result.verdict is None:
            is_correct = result.value is not None and result.value >= self._config.correct
            return Verdict.CORRECT if is_correct else Verdict.WRONG
        return Verdict(result.verdict)

    def _base_reward(self, verdict: Verdict, result: Result) -> float:
        if result.value is not None:
            return result.value
        return self._config.correct if verdict is Verdict.CORRECT else self._config.wrong


def start_pool(
    config: RewardConfig, setting: str, kind: str, answers: Sequence[str] = ()
) -> WorkerPool | None:
    """The workers of one kind of reward; None where it is judged at once.

    Raises InputError when a user's function cannot be used.
    """
    function = kind if is_import_path(kind) else None
    if kind != "math" and function is None:
        return None
    setting = "reward.function" if setting == "reward.kind" else f"{setting}.kind"
    pool = WorkerPool(
        num_workers=config.num_workers,
        deadline_s=config.deadline_s,
        memory_bytes=config.memory_mib << 20,
        function=function,
        setting=setting,
    )
    if function is not None:
        try_function(pool, setting, function, answers)
    return pool


def _as_part(name: str, result: Result) -> Result:
    """The result of a part: an error where its value is out of range; failures name the part."""
    reason = result.reason
    if not result.has_failed and not -1 <= result.points <= 1:
        reason = f"returned {result.points}: must lie between -1 and 1, the weight makes it count"
        result = replace(result, verdict="error", value=None)
    return replace(result, reason=f"part {name}: {reason}") if result.has_failed else result


def attach(
    groups: Sequence[RolloutGroup],
    scores: Mapping[Key, Score],
    first: Mapping[int, int] | None = None,
) -> list[RolloutGroup]:
    """The groups with reward and verdict filled in.

    first: group_id -> index of its first response here; without it that is 0.

    A response whose verification failed gets no reward: it is counted, and never trained on.
    """
    attached = []
    for group in groups:
        rollouts = []
        group_id = group.prompt.group_id
        for index, rollout in enumerate(group.rollouts, (first or {}).get(group_id, 0)):
            score = scores[group_id, index]
            reward = None if score.has_failed else score.reward
            rollouts.append(
                replace(
                    rollout,
                    reward=reward,
                    verdict=score.verdict,
                    reward_parts=score.parts,
                    extracted=score.extracted,
                )
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
