"""Whose log-probs a loss takes as old ones: the trainer's, or those that came with samples."""

from collections.abc import Iterator

from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.errors import ConfigError
from megatron_rl.megatron.config import OptimizerConfig

SETTING = "optimizer.old_logprobs"
BY_TRAINER = f"Set {SETTING}=trainer"


def takes_engines(optimizer: OptimizerConfig, config: AlgorithmConfig, *, lag: int) -> bool:
    """True where the log-probs that came with samples are the old ones; lag: run.lag."""
    if optimizer.old_logprobs == "auto":
        return lag > 0 and config.rollout_correction is None and uses_old_logprobs(config)
    return optimizer.old_logprobs == "engine"


def whose_are_old(
    optimizer: OptimizerConfig, config: AlgorithmConfig, lag: int, engine: str, dtype: str
) -> dict[str, bool]:
    """What plan_passes wants to know of those that came with samples.

    samples_itself: an engine that is the policy itself need not be asked again by a pass of its
    own. In 16 bits the same sums of another batch differ by up to a tenth.
    """
    is_auto = optimizer.old_logprobs == "auto" and config.rollout_correction is None
    return {
        "by_engine": takes_engines(optimizer, config, lag=lag),
        "samples_itself": is_auto and engine == "megatron" and dtype in ("float32", "float64"),
    }


def old_problems(
    optimizer: OptimizerConfig, config: AlgorithmConfig, *, is_supervised: bool
) -> Iterator[ConfigError]:
    """Why the engine's log-probs cannot be old ones."""
    if optimizer.old_logprobs != "engine":
        return
    rule = None
    if is_supervised:
        rule = "gold responses come from no engine"
    elif config.rollout_correction is not None:
        rule = (
            "has no sense beside algorithm.rollout_correction, which weighs by what differs "
            "between the trainer's and the engine's"
        )
    elif not uses_old_logprobs(config):
        rule = "has no effect, nothing in this algorithm uses old log-probs"
    if rule is not None:
        yield ConfigError(SETTING, optimizer.old_logprobs, rule, BY_TRAINER)


def lag_notices(optimizer: OptimizerConfig, config: AlgorithmConfig, *, lag: int) -> Iterator[str]:
    """A line on samples of earlier weights that nothing corrects for; lag: run.lag."""
    if not lag or config.rollout_correction is not None:
        return
    if takes_engines(optimizer, config, lag=lag):
        return
    yield (
        f"run.lag={lag}: samples of the weights one iteration before are trained as if the newest "
        "had drawn them. algorithm.rollout_correction={} would weigh them"
    )


def uses_old_logprobs(config: AlgorithmConfig) -> bool:
    """True where the loss, the critic's rewards or the teacher's part of advantages do."""
    has_kl_in_reward = config.resolved.needs_critic and config.kl_reward_coef != 0
    by_loss = config.objective.needs_old_logprobs or config.rollout_correction is not None
    return by_loss or has_kl_in_reward or config.distillation_weight != 0
