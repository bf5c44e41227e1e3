"""An algorithm as the loop uses it: select, assign advantages, weigh tokens, name the loss."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms import aggregation
from megatron_rl.algorithms.advantage import OF_GROUP, UNFINISHED, SumOverRanks, side, whiten
from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.presets import Preset
from megatron_rl.algorithms.selection import Candidates, KeepMask, keep_mask, keep_rules
from megatron_rl.algorithms.signs import is_usable
from megatron_rl.objectives.loss import Loss, loss_of
from megatron_rl.objectives.objective import Objective
from megatron_rl.ops.group_stats import GroupStats, group_stats
from megatron_rl.types import Rollout, RolloutGroup, Sample, UpdateTotals

NO_TOTALS = UpdateTotals(kept_sequences=0, kept_tokens=0, collected_sequences=0, collected_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """Counts of what became of this rank's groups and responses, to be added over ranks."""

    all_correct_groups: int = 0
    all_wrong_groups: int = 0
    mixed_groups: int = 0
    unusable_groups: int = 0  # without a single usable response
    unusable_rollouts: int = 0  # no finite reward, or no token; they count nowhere else
    zero_advantage_sequences: int = 0  # kept, but without a gradient and therefore not in samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """This rank's part of an iteration on its way to the update."""

    samples: list[Sample]  # what goes through the model, by group and index
    totals: dict[int, UpdateTotals]  # update -> this rank's contribution, to be added over ranks
    outcomes: Outcomes

    @property
    def kept_sequences(self) -> int:
        return sum(part.kept_sequences for part in self.totals.values())

    @property
    def kept_tokens(self) -> int:
        return sum(part.kept_tokens for part in self.totals.values())

    @property
    def collected_sequences(self) -> int:
        return sum(part.collected_sequences for part in self.totals.values())

    @property
    def collected_tokens(self) -> int:
        return sum(part.collected_tokens for part in self.totals.values())


@dataclass(frozen=True)
class Algorithm:
    """An AlgorithmConfig at work; holds no state."""

    config: AlgorithmConfig

    @cached_property
    def choice(self) -> Preset:
        """Selection, advantage, objective and aggregation, with the recipe's changes."""
        return self.config.resolved

    @property
    def objective(self) -> Objective:
        """The formula that is minimised, with its settings."""
        return self.config.objective

    @property
    def needs_old_logprobs(self) -> bool:
        """True where the loss uses them; in the first update on fresh rollouts they may be None."""
        return self.objective.needs_old_logprobs or self.config.rollout_correction is not None

    @property
    def needs_ref_logprobs(self) -> bool:
        return (
            self.config.kl_coef != 0
            or self.has_advantages_by_logprobs
            or self.objective.needs_ref_logprobs
        )

    @property
    def has_kl_in_reward(self) -> bool:
        """True where the critic's rewards lose the KL of every token."""
        return self.choice.needs_critic and self.config.kl_reward_coef != 0

    @property
    def has_advantages_by_logprobs(self) -> bool:
        """True where they need old and reference log-probs of every token, before any update."""
        return self.has_kl_in_reward or self.config.distillation_weight != 0

    def select(
        self,
        groups: Sequence[RolloutGroup],
        *,
        update_of: Mapping[int, int],
        seed: tuple[int, ...],
    ) -> Selection:
        """Samples that are worth a pass through the model, with their advantages.

        Depends on each group alone, so groups may lie on the ranks in any way. The totals count
        every kept response, also those dropped for an advantage of 0, which keeps the gradient
        what it would be with them.

        Args:
            groups: whole groups, graded.
            update_of: group_id -> optimizer step of this iteration, from 0.
            seed: of this iteration; with the group_id it breaks ties.
        """
        usable = [_usable(group, needs_reward=self.choice.needs_reward) for group in groups]
        stats = self._judge([candidates for _, candidates in usable])
        by_reward, advantages = _by_group(stats.keep, stats), _by_group(stats.advantages, stats)
        samples: list[Sample] = []
        totals = dict.fromkeys(sorted(set(update_of.values())), NO_TOTALS)
        counts = defaultdict(int, _outcomes(stats))
        for group, (indices, candidates), group_keep, group_advantage in zip(
            groups, usable, by_reward, advantages, strict=True
        ):
            counts["unusable_rollouts"] += len(group.rollouts) - len(indices)
            keep = self._keep(candidates, group_keep, group.prompt.group_id, seed)
            update = update_of[group.prompt.group_id]
            totals[update] = _add(totals[update], candidates.lengths, keep)
            for index, is_kept, value in zip(indices, keep, group_advantage, strict=True):
                advantage = value if is_kept else 0.0
                if self._goes_through_model(is_kept, advantage):
                    samples.append(
                        _sample(
                            group,
                            index,
                            update,
                            advantage,
                            has_gradient=is_kept and self._has_gradient(advantage),
                        )
                    )
                elif is_kept:
                    counts["zero_advantage_sequences"] += 1
        return Selection(samples=samples, totals=totals, outcomes=Outcomes(**counts))

    def assign_advantages(
        self, samples: Sequence[Sample], *, sum_over_ranks: SumOverRanks
    ) -> list[Sample]:
        """Samples with their final advantages, which batch_norm whitens and preference makes signs.

        Under gae they keep their rewards, for the critic to judge, and under distillation they have
        none, until the teacher has judged each token (policy/).

        Args:
            samples: all of the iteration's on this rank, possibly none.
            sum_over_ranks: every data-parallel rank must make this call under batch_norm.
        """
        if self.choice.advantage == "preference":
            return [replace(sample, advantage=side(sample.advantage)) for sample in samples]
        if self.choice.advantage == "distillation":
            return [replace(sample, advantage=0.0) for sample in samples]
        if self.choice.advantage != "batch_norm":
            return list(samples)
        whitened = whiten(
            torch.tensor([sample.advantage for sample in samples], dtype=torch.float64),
            torch.tensor([sample.num_response_tokens for sample in samples]),
            std_ddof=self.config.std_ddof,
            std_eps=self.config.std_eps,
            sum_over_ranks=sum_over_ranks,
        )
        return [
            replace(sample, advantage=value)
            for sample, value in zip(samples, whitened.tolist(), strict=True)
        ]

    def token_weight(self, sample: Sample, totals: UpdateTotals, max_response_tokens: int) -> float:
        """Share of the global loss of each response token, under the global totals of its update.

        0 for a response that only train_on_everything lets through.
        """
        if self.config.train_on_everything and sample.advantage == 0:
            return 0.0
        return aggregation.token_weight(
            self.choice.loss_aggregation,
            totals,
            response_tokens=sample.num_response_tokens,
            max_response_tokens=max_response_tokens,
            normalize_over=self.config.normalize_over,
        )

    def loss(self) -> Loss:
        """The loss of an optimizer step."""
        return loss_of(self.objective, self.config.shared_terms)

    def _judge(self, groups: Sequence[Candidates]) -> GroupStats:
        rewards = [reward for candidates in groups for reward in candidates.rewards]
        sizes = [len(candidates.rewards) for candidates in groups]
        return group_stats(
            torch.tensor(rewards, dtype=torch.float64),
            torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0),
            std_ddof=self.config.std_ddof,
            keep=keep_rules(self.choice.selection),
            advantage=OF_GROUP[self.choice.advantage],
            std_eps=self.config.std_eps,
        )

    def _keep(
        self, candidates: Candidates, by_reward: KeepMask, group_id: int, seed: tuple[int, ...]
    ) -> KeepMask:
        @cache  # few selections ask for it, and it takes longer than they do
        def tie_break() -> random.Random:
            return random.Random(repr((*seed, group_id)))  # text: alike in every process

        return keep_mask(
            candidates,
            by_reward,
            self.choice.selection,
            tie_break=tie_break,
            overlong_tokens=self.config.overlong_tokens,
            balanced_size=self.config.balanced_size,
            max_per_group=self.config.max_per_group,
        )

    def _goes_through_model(self, is_kept: bool, advantage: float) -> bool:
        if self.config.train_on_everything:
            return True
        is_dropped = self.config.drop_zero_advantage and not self._has_gradient(advantage)
        return is_kept and not is_dropped

    def _has_gradient(self, advantage: float) -> bool:
        """True for a kept response of that advantage on which some term of the loss acts."""
        return (
            advantage != 0
            or self.config.has_loss_on_every_token
            or self.choice.advantage in UNFINISHED
        )


def _usable(group: RolloutGroup, *, needs_reward: bool) -> tuple[list[int], Candidates]:
    """Positions of the responses that can be judged and trained, and what to judge them by."""
    indices = [
        index
        for index, rollout in enumerate(group.rollouts)
        if is_usable(rollout, needs_reward=needs_reward)
    ]
    rollouts = [group.rollouts[index] for index in indices]
    return indices, Candidates(
        rewards=tuple(_judged_by(rollout) for rollout in rollouts),
        lengths=tuple(r.num_response_tokens for r in rollouts),
        is_truncated=tuple(r.finish_reason == "length" for r in rollouts),
        is_gold=tuple(r.finish_reason == "gold" for r in rollouts),
    )


def _judged_by(rollout: Rollout) -> float:
    """Its reward; without one it is gold, which is right, or could not be verified."""
    if rollout.reward is None:
        return 1.0 if rollout.finish_reason == "gold" else 0.0
    return float(rollout.reward)


def _by_group(values: Tensor, stats: GroupStats) -> list[list[Any]]:
    """[n] values of all responses -> one list per group."""
    flat = iter(values.tolist())
    return [list(islice(flat, count)) for count in stats.counts.tolist()]


def _outcomes(stats: GroupStats) -> dict[str, int]:
    is_empty = stats.counts == 0
    is_uniform = stats.all_correct | stats.all_wrong
    outcomes = {
        "all_correct_groups": stats.all_correct,
        "all_wrong_groups": stats.all_wrong,
        "mixed_groups": ~(is_uniform | is_empty),
        "unusable_groups": is_empty,
    }
    return {name: int(is_so.sum()) for name, is_so in outcomes.items()}


def _add(totals: UpdateTotals, lengths: Sequence[int], keep: KeepMask) -> UpdateTotals:
    return UpdateTotals(
        kept_sequences=totals.kept_sequences + sum(keep),
        kept_tokens=totals.kept_tokens
        + sum(length for length, is_kept in zip(lengths, keep, strict=True) if is_kept),
        collected_sequences=totals.collected_sequences + len(lengths),
        collected_tokens=totals.collected_tokens + sum(lengths),
    )


def _sample(
    group: RolloutGroup, index: int, update: int, advantage: float, *, has_gradient: bool
) -> Sample:
    rollout = group.rollouts[index]
    return Sample(
        group_id=group.prompt.group_id,
        index=index,
        update=update,
        prompt_tokens=group.prompt.tokens,
        response_tokens=rollout.response_tokens,
        advantage=advantage,
        has_gradient=has_gradient,
        rollout_logprobs=rollout.rollout_logprobs,
        experts=rollout.experts,
        support=rollout.support,
    )
