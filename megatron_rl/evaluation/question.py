"""One question of a benchmark, with the responses to it and their verdicts."""

from dataclasses import dataclass

from megatron_rl.types import RolloutGroup, Verdict


@dataclass(frozen=True, kw_only=True)
class Question:
    """Plain values, which ranks can gather and files hold; tuples have one entry per response."""

    number: int  # its place in the benchmark's files, from 0
    prompt: str  # its text, without template
    answer: str
    responses: tuple[str, ...]
    verdicts: tuple[str, ...]
    extracted: tuple[str | None, ...]  # the answer found in the response
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]  # True: cut at the limit
    majority: float | None = None  # the chance that the majority is right (votes.py)

    @property
    def num_correct(self) -> int:
        return self.verdicts.count(Verdict.CORRECT)

    @property
    def num_cut_short(self) -> int:
        """The number of responses without an answer that were cut at the limit."""
        return sum(
            is_cut and verdict == Verdict.NO_ANSWER
            for is_cut, verdict in zip(self.truncated, self.verdicts, strict=True)
        )


def to_question(group: RolloutGroup) -> Question:
    """The question that a graded group answers."""
    return Question(
        number=group.prompt.group_id,
        prompt=group.prompt.text,
        answer=group.prompt.answer,
        responses=tuple(rollout.text for rollout in group.rollouts),
        verdicts=tuple(str(rollout.verdict) for rollout in group.rollouts),
        extracted=tuple(rollout.extracted for rollout in group.rollouts),
        tokens=tuple(rollout.num_response_tokens for rollout in group.rollouts),
        truncated=tuple(rollout.finish_reason == "length" for rollout in group.rollouts),
    )
