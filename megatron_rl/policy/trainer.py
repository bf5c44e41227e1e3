"""The forward passes and optimizer steps of an iteration."""

from collections.abc import Iterator, Mapping, Sequence

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.algorithms.gae import adapted_kl_coef
from megatron_rl.policy.config import CriticConfig
from megatron_rl.policy.critic import Critic
from megatron_rl.policy.passes import PassPlan
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.reference import Reference
from megatron_rl.policy.token_advantages import Estimated, estimate, with_distillation
from megatron_rl.types import MicroBatch, MiniBatch, Report

UNMADE = ("nonfinite_updates", "scaler_skipped")
"""Metrics of updates that were computed and not made."""


class Trainer:
    """Runs the passes and the optimizer steps of an iteration."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        passes: PassPlan,
        report: Report,
        *,
        epochs: int,
        reference: Reference | None,
        critic: Critic | None = None,
        critic_config: CriticConfig | None = None,
    ) -> None:
        """reference: None where no pass asks for it."""
        self.policy, self.algorithm, self.passes = policy, algorithm, passes
        self.critic, self._critic_config = critic, critic_config or CriticConfig()
        self.kl_reward_coef = algorithm.config.kl_reward_coef
        self._report, self._epochs, self._reference = report, epochs, reference

    def add_logprobs(self, batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Old and reference log-probs, where they are needed and nowhere else.

        The first mini-batch that is trained meets the very weights that are asked about, so its
        old log-probs are its own current ones.
        """
        result = list(batches)
        trained = [batch.update for batch in _trained(batches)]
        for update in trained if self.passes.old_first else trained[1:]:
            if self.passes.by_engine:
                result[update] = _with_those_of_the_engine(result[update])
            elif self.passes.old:
                values = self.policy.logprobs(result[update].microbatches)
                result[update] = result[update].with_loss("old_logprobs", values)
        if self.passes.ref and (compared := list(_trained(batches))):
            assert self._reference is not None
            of_batches = self._reference.logprobs(compared)
            for batch, values in zip(compared, of_batches, strict=True):
                result[batch.update] = result[batch.update].with_loss("ref_logprobs", values)
        return result

    def add_advantages(self, batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Advantages per token: from the critic, and a teacher's part, where there are these."""
        if not list(_trained(batches)):
            return list(batches)
        return with_distillation(
            self._by_critic(batches), self.algorithm.config.distillation_weight
        )

    def _by_critic(self, batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        if self.critic is None:
            return list(batches)
        values = [
            self.critic.values(batch.microbatches) if batch.num_samples else None
            for batch in batches
        ]
        estimated = estimate(
            batches,
            values,
            self.algorithm.config,
            kl_coef=self.kl_reward_coef,
            sum_over_ranks=self.policy.summed,
        )
        self._adapt_kl_coef(estimated)
        return estimated.batches

    def update(self, batches: Sequence[MiniBatch]) -> None:
        """Take all optimizer steps of the iteration; means over them are reported."""
        trained = list(_trained(batches))
        history: list[dict[str, float]] = []
        updates = 0
        for epoch in range(self._epochs):
            for step, batch in enumerate(trained):
                waits = self._update_critic(batch, history)
                if waits:
                    continue
                is_first = epoch == 0 and step == 0
                result = self.policy.update(
                    [_measurable(mb, is_first=is_first) for mb in batch.microbatches],
                    self.algorithm.loss(),
                )
                history.append(result.metrics)
                updates += not any(result.metrics.get(f"policy/{why}") for why in UNMADE)
                if self._keeps_own_as_old(is_first=is_first):
                    trained[0] = batch.with_loss("old_logprobs", result.logprobs)
        skipped = (len(batches) - len(trained)) * self._epochs
        self._report(
            {
                **_over_steps(history),
                "policy/updates": float(updates),
                "policy/skipped_updates": float(skipped),
            }
        )

    def state_dict(self) -> dict[str, float]:
        """The state that a resumed run needs besides weights and optimizers."""
        return {
            "kl_reward_coef": self.kl_reward_coef,
            "kl_reward_coef_start": self.algorithm.config.kl_reward_coef,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with the adapted coefficient, unless the recipe sets another one than it did."""
        config = self.algorithm.config
        is_set_anew = state.get("kl_reward_coef_start", config.kl_reward_coef) != (
            config.kl_reward_coef
        )
        if config.kl_reward_target is not None and not is_set_anew:
            self.kl_reward_coef = state["kl_reward_coef"]

    def _update_critic(self, batch: MiniBatch, history: list[dict[str, float]]) -> bool:
        """Train the critic, where there is one; True where the policy still waits for it."""
        if self.critic is None:
            return False
        waits = self.critic.version < self._critic_config.warmup_updates
        history.append(
            self.critic.update(
                batch.microbatches,
                num_tokens=batch.totals.kept_tokens,
                clip=self._critic_config.value_clip,
            )
        )
        return waits

    def _keeps_own_as_old(self, *, is_first: bool) -> bool:
        """True where this update has just computed the next epoch's old log-probs."""
        return (
            is_first
            and self._epochs > 1
            and self.algorithm.needs_old_logprobs
            and not self.passes.old_first
        )

    def _adapt_kl_coef(self, estimated: Estimated) -> None:
        config = self.algorithm.config
        if not config.kl_reward_coef:
            return
        self._report(
            {
                "critic/kl_per_response": estimated.kl_mean,
                "critic/kl_reward_coef": self.kl_reward_coef,
            }
        )
        if config.kl_reward_target is not None:
            self.kl_reward_coef = adapted_kl_coef(
                self.kl_reward_coef,
                kl=estimated.kl_mean,
                target=config.kl_reward_target,
                responses=estimated.responses,
                horizon=config.kl_reward_horizon,
            )


def _trained(batches: Sequence[MiniBatch]) -> Iterator[MiniBatch]:
    return (batch for batch in batches if batch.num_samples)


def _with_those_of_the_engine(batch: MiniBatch) -> MiniBatch:
    """The mini-batch with the log-probs that came with its samples as old ones, and as no others.

    Beside themselves they would measure no gap between engine and trainer.
    """
    return batch.with_rows(
        row.with_loss(old_logprobs=row.loss.rollout_logprobs, rollout_logprobs=None)
        for row in batch.microbatches
    )


def _measurable(batch: MicroBatch, *, is_first: bool) -> MicroBatch:
    """The row without rollout_logprobs where their distance would not measure the engine.

    After the first update logprobs have moved, so their distance from rollout_logprobs would
    measure learning. Without old_logprobs, drop it there.
    """
    if is_first or batch.loss.old_logprobs is not None:
        return batch
    return batch.with_loss(rollout_logprobs=None)


def _over_steps(history: Sequence[dict[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for name in sorted({name for step in history for name in step}):
        values = [step[name] for step in history if name in step]
        if name.endswith("_max"):
            merged[name] = max(values)
        elif name == "policy/trained_tokens" or name.endswith(UNMADE):
            merged[name] = sum(values)
        elif name.endswith(("/lr", "/loss_scale")):
            merged[name] = values[-1]
        else:
            merged[name] = sum(values) / len(values)
    return merged
