"""What is measured of the policy on responses drawn before selection: entropy, and KL to the start.

Methods that train on different responses stay comparable so, since all of theirs are alike drawn.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.batching.measured import measured_samples
from megatron_rl.batching.packer import Packer
from megatron_rl.metrics.config import MetricsConfig
from megatron_rl.objectives.token_loss import k3
from megatron_rl.parallel.collectives import sum_over
from megatron_rl.policy.policy import Policy
from megatron_rl.types import MicroBatch, Report, RolloutGroup


class BeforeSelection:
    """Measures the weights that sampled, every few iterations, before they are updated."""

    def __init__(
        self,
        policy: Policy,
        packer: Packer,
        initial: Mapping[str, Tensor] | None,
        report: Report,
        config: MetricsConfig,
        *,
        kl_every: int,
        most_each: int | None = None,
    ) -> None:
        """Args:
        policy: with the weights that sampled.
        packer: of the run.
        initial: this rank's first weights, in host memory; None where kl_every is 0.
        report: takes the results.
        config: entropy_every; kl_rollouts, which is over all ranks.
        kl_every: in iterations; 0 also where the KL is measured anyway.
        most_each: of a group, the first so many responses alone; so prompts of which rounds drew
            more weigh no more than others.
        """
        self._most_each = most_each
        self._policy, self._packer, self._initial = policy, packer, initial
        self._report, self._kl_every = report, kl_every
        self._entropy_every = config.entropy_every
        self._share = -(-config.kl_rollouts // policy.groups.layout.world_size)

    def measure(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Report what is due, over all groups; every rank calls it, with its own."""
        wants_entropy = _is_due(iteration, self._entropy_every)
        wants_kl = _is_due(iteration, self._kl_every)
        if not (wants_entropy or wants_kl):
            return
        drawn = measured_samples(groups, self._most_each)
        step = max(1, len(drawn) // self._share)
        batches = self._packer.pack_for_measuring(drawn[::step][: self._share])
        if wants_entropy:
            entropies = self._policy.entropies(batches)
            self._report_means(batches, entropies, _entropy_sums, ("policy/entropy_sampled",))
        if wants_kl:
            assert self._initial is not None
            with self._policy.weights_replaced(self._initial):
                initial = self._policy.logprobs([row.without_experts for row in batches])
            names = ("policy/kl_initial_k1", "policy/kl_initial_k3")
            self._report_means(batches, initial, _kl_sums, names)

    def _report_means(
        self,
        batches: Sequence[MicroBatch],
        values: Sequence[Tensor] | None,
        sums_of: Callable[[MicroBatch, Tensor], Sequence[float]],
        names: Sequence[str],
    ) -> None:
        """Report means over all tokens of the last stage; sums_of: [N] values -> N and the sums."""
        sums = torch.zeros(1 + len(names), dtype=torch.float64)
        if values is not None and self._policy.groups.is_first_copy:
            for batch, of_tokens in zip(batches, values, strict=True):
                sums += torch.tensor(sums_of(batch, of_tokens.cpu().double()), dtype=torch.float64)
        tokens, *totals = sum_over(sums.tolist(), self._policy.groups.world)
        if tokens:
            self._report({name: t / tokens for name, t in zip(names, totals, strict=True)})


def _is_due(iteration: int, every: int) -> bool:
    return bool(every) and iteration % every == 0


def _entropy_sums(batch: MicroBatch, entropies: Tensor) -> tuple[float, float]:
    return len(entropies), float(entropies.sum())


def _kl_sums(batch: MicroBatch, initial: Tensor) -> tuple[float, float, float]:
    """The engine's log-probs stand for the policy's: it sampled from the same weights."""
    if batch.loss.rollout_logprobs is None:
        return 0, 0.0, 0.0
    log_ratio = batch.loss.rollout_logprobs.cpu().double() - initial
    return len(log_ratio), float(log_ratio.sum()), float(k3(-log_ratio).sum())
