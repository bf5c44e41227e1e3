"""How far the policy has moved from its initial weights, on responses drawn before selection."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.batching.measured import measured_samples
from megatron_rl.batching.packer import Packer
from megatron_rl.objectives.token_loss import k3
from megatron_rl.parallel.collectives import sum_over
from megatron_rl.policy.policy import Policy
from megatron_rl.types import Report, RolloutGroup


class InitialKl:
    """Measures KL(policy || initial policy) every few iterations.

    Methods that train on different responses stay comparable, since what is scored is drawn from
    all of them. The engine's log-probs stand for the policy's: it sampled from the same weights.
    """

    def __init__(
        self,
        policy: Policy,
        packer: Packer,
        initial: Mapping[str, Tensor] | None,
        report: Report,
        *,
        every: int,
        num_rollouts: int,
    ) -> None:
        """Measure in iterations that `every` divides; 0: never.

        Args:
            policy: with the weights that sampled.
            packer: of the run.
            initial: this rank's first weights, in host memory; None where every is 0.
            report: takes the result.
            every: in iterations.
            num_rollouts: over all ranks.
        """
        self._policy, self._packer, self._initial = policy, packer, initial
        self._report, self._every = report, every
        self._share = -(-num_rollouts // policy.groups.layout.world_size)

    def measure(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Report the estimates k1 and k3 over all groups; every rank calls it, with its own."""
        if not self._every or iteration % self._every:
            return
        assert self._initial is not None
        drawn = measured_samples(groups)
        step = max(1, len(drawn) // self._share)
        batches = self._packer.pack_for_measuring(drawn[::step][: self._share])
        with self._policy.weights_replaced(self._initial):
            values = self._policy.logprobs(batches)
        sums = torch.zeros(3, dtype=torch.float64)
        if values is not None and self._policy.groups.is_first_copy:
            for batch, initial in zip(batches, values, strict=True):
                sampled = batch.loss.rollout_logprobs
                if sampled is not None:
                    sums += _kl_sums((sampled - initial).double().cpu())
        tokens, k1_sum, k3_sum = sum_over(sums.tolist(), self._policy.groups.world)
        if tokens:
            self._report(
                {
                    "policy/kl_initial_k1": k1_sum / tokens,
                    "policy/kl_initial_k3": k3_sum / tokens,
                }
            )


def _kl_sums(log_ratio: Tensor) -> Tensor:
    """[3] float64: tokens, and the sums of their k1 and k3; log_ratio [N] float64."""
    count = torch.tensor(float(len(log_ratio)), dtype=torch.float64)
    return torch.stack([count, log_ratio.sum(), k3(-log_ratio).sum()])
