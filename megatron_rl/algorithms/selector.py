"""The algorithm's choice over all ranks: kept samples, and their final advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.algorithm import Algorithm, Selection
from megatron_rl.algorithms.signs import is_usable, signs
from megatron_rl.parallel.collectives import all_gather_objects, sum_over
from megatron_rl.types import Prompt, Report, Rollout, RolloutGroup, Sample


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Runs one algorithm's selection and advantages, each group on the rank that holds it."""

    algorithm: Algorithm
    world: dist.ProcessGroup
    prompts_per_update: int | None  # None: the whole batch is one mini-batch
    num_mixed: int | None = None  # groups that a batch is filled with; None: it is what was drawn
    run_seed: int
    report: Report

    def select(
        self, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], iteration: int
    ) -> Selection:
        """The samples worth a pass through the model; every rank calls it, with its own groups.

        prompts: the whole batch, whose order says which group belongs to which mini-batch. Where
        it was filled, only the first num_mixed groups with right and wrong responses count.
        """
        drawn = groups
        if self.num_mixed is not None:
            prompts, groups = self._mixed(prompts, groups, self.num_mixed)
        each = self.prompts_per_update or len(prompts)
        selection = self.algorithm.select(
            groups,
            update_of={p.group_id: position // each for position, p in enumerate(prompts)},
            seed=(self.run_seed, iteration),
        )
        self._report(selection, drawn)
        samples = self.algorithm.assign_advantages(
            selection.samples, sum_over_ranks=self._sum_over_ranks
        )
        return replace(selection, samples=samples)

    def _mixed(
        self, prompts: Sequence[Prompt], groups: Sequence[RolloutGroup], count: int
    ) -> tuple[list[Prompt], list[RolloutGroup]]:
        """The first `count` prompts whose groups are mixed, and this rank's groups of them."""
        own = [group.prompt.group_id for group in groups if signs(group.rollouts).are_mixed]
        mixed = {group_id for part in all_gather_objects(own, self.world) for group_id in part}
        chosen = [prompt for prompt in prompts if prompt.group_id in mixed][:count]
        ids = {prompt.group_id for prompt in chosen}
        return chosen, [group for group in groups if group.prompt.group_id in ids]

    def _report(self, selection: Selection, drawn: Sequence[RolloutGroup]) -> None:
        """drawn: this rank's groups, also those that no batch was filled with."""
        needs_reward = self.algorithm.choice.needs_reward
        rollouts = [rollout for group in drawn for rollout in group.rollouts]
        usable = [r for r in rollouts if is_usable(r, needs_reward=needs_reward)]
        trained = [sample for sample in selection.samples if sample.has_gradient]
        kept, kept_tokens, judged, judged_tokens, unusable, wasted, wasted_tokens = sum_over(
            [
                selection.kept_sequences,
                selection.kept_tokens,
                len(usable),
                _tokens(usable),
                len(rollouts) - len(usable),
                len(rollouts) - len(trained),
                _tokens(rollouts) - _tokens(trained),
            ],
            self.world,
        )
        self.report(
            {
                "algorithms/kept_responses": kept,
                "algorithms/kept_responses_frac": kept / max(judged, 1),
                "algorithms/kept_tokens": kept_tokens,
                "algorithms/kept_tokens_frac": kept_tokens / max(judged_tokens, 1),
                "algorithms/unusable_responses": unusable,
                "algorithms/wasted_responses": wasted,
                "algorithms/wasted_tokens": wasted_tokens,
            }
        )

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        total = sum_over(values.flatten().tolist(), self.world)
        return torch.tensor(total, dtype=torch.float64).view(values.shape)


def _tokens(responses: Sequence[Rollout] | Sequence[Sample]) -> int:
    return sum(response.num_response_tokens for response in responses)
