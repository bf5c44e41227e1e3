"""The forward passes that an algorithm needs besides the update's own; decided once per run."""

from dataclasses import dataclass

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.policy.old_logprobs import uses_old_logprobs


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """The forward passes that run, with a reason for each that runs or does not."""

    old: bool  # before the first update
    by_engine: bool  # the log-probs that came with samples are the old ones
    old_first: bool  # also for the first mini-batch, which otherwise needs none: its ratio is 1
    ref: bool
    values: bool
    reasons: tuple[tuple[str, str], ...]  # name of a pass, and why it runs or not


def plan_passes(
    algorithm: Algorithm,
    *,
    num_updates: int,
    epochs: int,
    critic_warmup: int = 0,
    counts_experts: bool = False,
    replays_routing: bool = False,
    by_engine: bool = False,
    samples_itself: bool = False,
) -> PassPlan:
    """Decide once per run; the reasons are printed at start-up and by `plan`.

    Args:
        algorithm: the recipe's.
        num_updates: mini-batches of an iteration.
        epochs: times that each is trained.
        critic_warmup: updates of the critic that the policy waits for.
        counts_experts: a loss of routers is balanced over whole updates.
        replays_routing: tokens go to the experts that the engine chose.
        by_engine: its log-probs are the old ones, where any are used.
        samples_itself: so they are, too, where that spares a pass: the policy sampled, in a dtype
            in which what it says of a token again differs by the rounding of sums alone.
    """
    old_first = algorithm.has_advantages_by_logprobs or critic_warmup > 0
    values = algorithm.choice.needs_critic
    runs = algorithm.needs_old_logprobs and (num_updates > 1 or old_first)
    why_old = _why_old(algorithm, num_updates, epochs, old_first=old_first)
    if by_engine and uses_old_logprobs(algorithm.config):
        old_first = True
        why_old = "skipped, the engine's log-probs of its samples are the old ones"
    elif by_engine := runs and samples_itself:
        why_old = "skipped, the policy itself sampled, and said what is old"
    reasons = [
        ("old-log-prob pass", why_old),
        ("reference pass", _why_ref(algorithm)),
    ]
    if values:
        reasons.append(("value pass", "every kept response, algorithm.advantage=gae"))
    if counts_experts:
        why = "every row of an update, moe_router_load_balancing_type=global_aux_loss asks how many"
        reasons.append(("pass that counts experts", f"{why} tokens each expert has"))
    if replays_routing:
        told = "passes of the policy take the experts that the engine chose"
        reasons.append(("routing replay", f"{told}, references and critic their own"))
    return PassPlan(
        old=runs and not by_engine,
        by_engine=by_engine,
        old_first=old_first,
        ref=algorithm.needs_ref_logprobs,
        values=values,
        reasons=tuple(reasons),
    )


def _why_old(algorithm: Algorithm, num_updates: int, epochs: int, *, old_first: bool) -> str:
    if not algorithm.needs_old_logprobs:
        return "skipped, the loss does not use them"
    if algorithm.has_kl_in_reward:
        return "every kept response, algorithm.kl_reward_coef is in its reward"
    if algorithm.has_advantages_by_logprobs:
        return "every kept response, the teacher's part of advantages needs them"
    if old_first:
        return "every kept response, while the policy waits for the critic"
    if num_updates * epochs == 1:
        return "skipped, one update on fresh rollouts has ratio exactly 1"
    if num_updates == 1:
        return "skipped, the first epoch's own forward gives them"
    return f"for {num_updates - 1} of {num_updates} mini-batches, the first has ratio exactly 1"


def _why_ref(algorithm: Algorithm) -> str:
    if not algorithm.needs_ref_logprobs:
        return "skipped, neither loss nor reward asks for a reference"
    config = algorithm.config
    if algorithm.objective.needs_ref_logprobs:
        return "both responses of every pair, algorithm.objective.reference=initial"
    asking = {
        "distillation_coef": config.distillation_weight,
        "kl_reward_coef": config.kl_reward_coef if algorithm.has_kl_in_reward else 0.0,
        "kl_coef": config.kl_coef,
    }
    told = (f"algorithm.{name}={value:g}" for name, value in asking.items() if value)
    return f"every kept response, {', '.join(told)}"
