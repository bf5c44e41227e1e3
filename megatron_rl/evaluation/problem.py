"""What became of one problem of a benchmark."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.reward.scorer import Key, Score
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


def to_problem(group: RolloutGroup, scores: Mapping[Key, Score]) -> Problem:
    """A group of a benchmark's prompt, with what the scorer says of each response."""
    number = group.prompt.group_id
    own = [scores[number, index] for index in range(len(group.rollouts))]
    return Problem(
        number=number,
        prompt=group.prompt.text,
        answer=group.prompt.answer,
        responses=tuple(rollout.text for rollout in group.rollouts),
        verdicts=tuple(str(score.verdict) for score in own),
        extracted=tuple(score.extracted for score in own),
        tokens=tuple(len(rollout.response_tokens) for rollout in group.rollouts),
        truncated=tuple(rollout.finish_reason == "length" for rollout in group.rollouts),
    )
