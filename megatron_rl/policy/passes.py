"""Which forward passes an algorithm needs besides the update's own; decided once per run."""

from dataclasses import dataclass

from megatron_rl.algorithms.algorithm import Algorithm


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """Which forward passes the algorithm needs besides the update's own, and why not the others."""

    old: bool  # before the first update, for mini-batches that come after it
    ref: bool
    reasons: tuple[str, ...]


def plan_passes(algorithm: Algorithm, *, num_updates: int, epochs: int) -> PassPlan:
    """Decide once per run; the reasons are printed at start-up and by `plan`."""
    steps = num_updates * epochs
    old = algorithm.needs_old_logprobs and num_updates > 1
    if not algorithm.needs_old_logprobs:
        why_old = "old-log-prob pass: skipped, the loss has no ratio"
    elif steps == 1:
        why_old = "old-log-prob pass: skipped, one update on fresh rollouts has ratio exactly 1"
    elif num_updates == 1:
        why_old = "old-log-prob pass: skipped, the first epoch's own forward gives them"
    else:
        why_old = (
            f"old-log-prob pass: for {num_updates - 1} of {num_updates} mini-batches, the first "
            "has ratio exactly 1"
        )
    why_ref = (
        f"reference pass: every kept response, algorithm.kl_coef={algorithm.config.kl_coef}"
        if algorithm.needs_ref_logprobs
        else "reference pass: skipped, no KL term in the loss"
    )
    return PassPlan(old=old, ref=algorithm.needs_ref_logprobs, reasons=(why_old, why_ref))
