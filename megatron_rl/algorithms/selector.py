"""The algorithm's choice over all ranks: kept samples, and their final advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.algorithms.algorithm import Algorithm, Selection
from megatron_rl.parallel.collectives import sum_over
from megatron_rl.types import Prompt, Report, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Runs one algorithm's selection and advantages, each group on the rank that holds it."""

    algorithm: Algorithm
    world: dist.ProcessGroup
    prompts_per_update: int | None  # None: the whole batch is one mini-batch
    run_seed: int
    report: Report

    def select(
        self, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], iteration: int
    ) -> Selection:
        """The samples worth a pass through the model; every rank calls it, with its own groups.

        prompts: the whole batch, whose order says which group belongs to which mini-batch.
        """
        each = self.prompts_per_update or len(prompts)
        selection = self.algorithm.select(
            groups,
            update_of={p.group_id: position // each for position, p in enumerate(prompts)},
            seed=(self.run_seed, iteration),
        )
        self._report(selection)
        samples = self.algorithm.assign_advantages(
            selection.samples, sum_over_ranks=self._sum_over_ranks
        )
        return replace(selection, samples=samples)

    def _report(self, selection: Selection) -> None:
        kept, kept_tokens, collected, collected_tokens, unusable = sum_over(
            [
                selection.kept_sequences,
                selection.kept_tokens,
                selection.collected_sequences,
                selection.collected_tokens,
                selection.outcomes.unusable_rollouts,
            ],
            self.world,
        )
        self.report(
            {
                "algorithms/kept_responses_frac": kept / max(collected, 1),
                "algorithms/kept_tokens_frac": kept_tokens / max(collected_tokens, 1),
                "algorithms/unusable_responses": unusable,
            }
        )

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        total = sum_over(values.flatten().tolist(), self.world)
        return torch.tensor(total, dtype=torch.float64).view(values.shape)
