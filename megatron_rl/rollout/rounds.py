"""Responses drawn in rounds: a prompt leaves when it has enough right and wrong ones.

Example: three prompts, two responses a round and six at most, until one is right and one wrong.
Round 1 gives + -, - - and + +. The first prompt leaves; in round 2 the others draw two more each
and get - + and + +, so the second leaves with four responses. In round 3 the third gets + + again
and has drawn its six. With `fill` one of three mixed groups is missing then, and as many new
prompts are drawn as are expected to bring it.

Every rank takes part in every round, also one whose prompts have all left: engines and grading are
collective. A prompt stays with the rank that drew it first, so its group never travels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from megatron_rl.algorithms.signs import Signs, signs
from megatron_rl.parallel.collectives import all_gather_objects, sum_over
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.reward.scorer import MAX_FAILURES, RewardScorer, attach
from megatron_rl.rollout.config import RoundsConfig
from megatron_rl.rollout.sampler import Sampler, Share
from megatron_rl.types import Draw, Prompt, Report, Rollout, RolloutGroup, Verdict


@dataclass(frozen=True, kw_only=True)
class RoundsPlan:
    """The rule of a run's rounds."""

    config: RoundsConfig
    group_size: int  # responses of a round
    max_responses: int  # of a prompt
    num_wanted: int  # mixed groups that fill a batch
    max_prompts: int  # of an iteration

    def holds(self, found: Signs) -> bool:
        """Whether a prompt with these responses has enough."""
        enough = self.config
        return found.positive >= enough.until_positive and found.negative >= enough.until_negative

    def line(self) -> str:
        """A line for the start of a run."""
        enough, told = self.config, f"{self.group_size} responses of a prompt"
        if self.max_responses > self.group_size:
            told += (
                f" each, up to {self.max_responses} or until {enough.until_positive} are right and "
                f"{enough.until_negative} wrong"
            )
        if enough.fill:
            told += f"; new prompts, {self.max_prompts} at most, until {self.num_wanted} are mixed"
        return f"rounds: {told}; not in evaluations and the engine probe"


@dataclass(slots=True)
class Progress:
    """How far a prompt has come; the same on all ranks."""

    drawn: int = 0
    found: Signs = field(default_factory=Signs)

    def has_left(self, plan: RoundsPlan) -> bool:
        return self.drawn > 0 and (self.drawn >= plan.max_responses or plan.holds(self.found))

    def next_round(self, plan: RoundsPlan) -> range:
        """The indices of the responses that it draws next; none where it has left."""
        if self.has_left(plan):
            return range(0)
        return range(self.drawn, min(self.drawn + plan.group_size, plan.max_responses))


def num_new_prompts(states: Sequence[Progress], plan: RoundsPlan) -> int:
    """How many prompts to draw beside those that are there, for their next round.

    As many as the missing groups need at the share that was mixed so far, those that still go on
    being counted as mixed. A round has never more prompts than the first one.
    """
    if not plan.config.fill:
        return 0
    left = [state for state in states if state.has_left(plan)]
    mixed, active = sum(state.found.are_mixed for state in left), len(states) - len(left)
    missing = plan.num_wanted - mixed - active
    if missing <= 0:
        return 0
    expected = -(-missing * (len(left) + 1) // (mixed + 1))
    return max(0, min(expected, plan.num_wanted - active, plan.max_prompts - len(states)))


@dataclass(kw_only=True)
class Rounds:
    """Draws and grades the responses of an iteration."""

    plan: RoundsPlan
    draw: Draw
    sampler: Sampler
    scorer: RewardScorer
    stop: StopRequest
    world: dist.ProcessGroup
    more: Callable[[int], list[Prompt]]
    """So many further prompts, the same on every rank."""
    say: Callable[[str], None]
    has_told: bool = False

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int, report: Report
    ) -> list[RolloutGroup]:
        """This rank's graded groups of all prompts that were drawn; every rank calls it.

        They are none where a rank was told to stop: then the iteration is to be dropped.
        """
        drawn = _Drawn(self.sampler.share_of(prompts))
        states = {prompt.group_id: Progress() for prompt in prompts}
        num_rounds, failures = 0, list[str]()
        while indices := self._next_round(states):
            sampled = self.sampler.generate_share(
                drawn.share,
                indices,
                self.draw,
                iteration=iteration,
                policy_version=policy_version,
                grader=self.scorer,
                stop=self.stop,
            )
            if self.stop.agreed(self.world):
                return []
            graded = self._graded(sampled, indices)
            failures += self.scorer.failures if graded else []
            drawn.add(graded)
            self._advance(states, indices, graded)
            num_rounds += 1
            if count := num_new_prompts(list(states.values()), self.plan):
                new = self.more(count)
                drawn.share += self.sampler.share_of(new)
                states |= {prompt.group_id: Progress() for prompt in new}
        self.scorer.failures = failures[:MAX_FAILURES]
        report({"rollout/rounds": float(num_rounds)})
        self._tell(list(states.values()), iteration)
        return drawn.groups()

    def _next_round(self, states: Mapping[int, Progress]) -> dict[int, range]:
        asked = {group_id: state.next_round(self.plan) for group_id, state in states.items()}
        return {group_id: indices for group_id, indices in asked.items() if indices}

    def _graded(
        self, sampled: Sequence[RolloutGroup], indices: Mapping[int, range]
    ) -> list[RolloutGroup]:
        """This rank's responses of one round with rewards; waits for the last of them."""
        first = {group_id: asked.start for group_id, asked in indices.items()}
        return attach(sampled, self.scorer.collect(), first)

    def _advance(
        self,
        states: Mapping[int, Progress],
        indices: Mapping[int, range],
        graded: Sequence[RolloutGroup],
    ) -> None:
        """Count what all ranks found."""
        own = {group.prompt.group_id: signs(group.rollouts) for group in graded}
        for part in all_gather_objects(own, self.world):
            for group_id, found in part.items():
                states[group_id].found += found
        for group_id, asked in indices.items():
            states[group_id].drawn = asked.stop

    def _tell(self, states: Sequence[Progress], iteration: int) -> None:
        """Say, the first time, that a batch could not be filled."""
        mixed = sum(state.found.are_mixed for state in states)
        if self.plan.config.fill and mixed < self.plan.num_wanted and not self.has_told:
            self.has_told = True
            self.say(
                f"iteration {iteration}: {mixed} of {self.plan.num_wanted} groups are mixed after "
                f"{len(states)} prompts, the most that rollout.rounds.max_prompts and the data "
                "allow; it trains on these. rollout/missing_groups counts them from here on"
            )


class _Drawn:
    """What this rank has of its groups so far."""

    def __init__(self, share: Share) -> None:
        self.share = share
        self._rollouts: dict[int, list[Rollout]] = {}

    def add(self, graded: Sequence[RolloutGroup]) -> None:
        for group in graded:
            self._rollouts.setdefault(group.prompt.group_id, []).extend(group.rollouts)

    def groups(self) -> list[RolloutGroup]:
        return [
            RolloutGroup(prompt=prompt, rollouts=tuple(self._rollouts[prompt.group_id]))
            for prompt in self.share.prompts
            if prompt.group_id in self.share.own
        ]


def round_metrics(
    groups: Sequence[RolloutGroup], plan: RoundsPlan, world: dist.ProcessGroup
) -> dict[str, float]:
    """What rounds brought, of all ranks' groups; every rank calls it with its own graded ones."""
    found = [signs(group.rollouts) for group in groups]
    first = [rollout for group in groups for rollout in group.rollouts[: plan.group_size]]
    prompts, satisfied, mixed, correct, responses = sum_over(
        [
            len(groups),
            sum(map(plan.holds, found)),
            sum(each.are_mixed for each in found),
            sum(rollout.verdict is Verdict.CORRECT for rollout in first),
            len(first),
        ],
        world,
    )
    values = {
        "rollout/prompts": prompts,
        "rollout/prompts_satisfied_frac": satisfied / max(prompts, 1),
        "reward/first_round_accuracy": correct / max(responses, 1),
    }
    if plan.config.fill:
        values["rollout/filled_groups"] = min(mixed, plan.num_wanted)
        values["rollout/missing_groups"] = max(plan.num_wanted - mixed, 0)
    return values
