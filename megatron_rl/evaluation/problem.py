"""What became of one problem of a benchmark."""

from dataclasses import dataclass

from megatron_rl.types import RolloutGroup, Verdict


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Plain values, one entry a response, so that ranks can gather and files hold it."""

    number: int  # row of the benchmark's file, from 0
    prompt: str  # the question, without template
    answer: str
    responses: tuple[str, ...]
    verdicts: tuple[str, ...]
    extracted: tuple[str | None, ...]  # the answer found in the response
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]  # cut at the limit
    majority: float | None = None  # votes.majority

    @property
    def num_correct(self) -> int:
        return self.verdicts.count(Verdict.CORRECT)

    @property
    def num_failed(self) -> int:
        """Responses whose verification failed; they count as not correct."""
        return self.verdicts.count(Verdict.TIMEOUT) + self.verdicts.count(Verdict.ERROR)


def to_problem(group: RolloutGroup) -> Problem:
    """A graded group of a benchmark's prompt."""
    return Problem(
        number=group.prompt.group_id,
        prompt=group.prompt.text,
        answer=group.prompt.answer,
        responses=tuple(rollout.text for rollout in group.rollouts),
        verdicts=tuple(str(rollout.verdict) for rollout in group.rollouts),
        extracted=tuple(rollout.extracted for rollout in group.rollouts),
        tokens=tuple(len(rollout.response_tokens) for rollout in group.rollouts),
        truncated=tuple(rollout.finish_reason == "length" for rollout in group.rollouts),
    )
