"""What a schedule of the learning rate comes to in a run, where that may surprise."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_rl.megatron.config import OptimizerConfig


def schedule_notes(
    optimizer: OptimizerConfig,
    *,
    run_updates: int,
    taken: int,
    former: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Lines about a schedule that ends too early or never gets to its peak.

    Args:
        optimizer: its settings.
        run_updates: the most optimizer steps that the run can take.
        taken: those that were taken before this start.
        former: the state of the schedule in the checkpoint; None: nothing is resumed.
    """
    decays, warmup = optimizer.lr_schedule != "constant", optimizer.lr_warmup_updates
    end = optimizer.lr_decay_updates or run_updates
    if warmup > run_updates:
        yield (
            f"optimizer.lr_warmup_updates={warmup}: the run has at most {run_updates} updates, so "
            f"the learning rate never gets to optimizer.lr={optimizer.lr:g}. Lower it"
        )
    elif decays and warmup > end:
        yield (
            f"optimizer.lr_warmup_updates={warmup}: the schedule ends at update {end}, so the "
            f"warm-up is cut to {end}. Lower it, or raise optimizer.lr_decay_updates"
        )
    if decays and end <= taken < run_updates:
        yield (
            f"optimizer.lr_schedule={optimizer.lr_schedule}: it ended at update {end}, and {taken} "
            f"are taken, so the learning rate stays at optimizer.min_lr={optimizer.min_lr:g}. "
            "Raise optimizer.lr_decay_updates"
        )
    if former is None or not decays or former["lr_decay_style"] == "constant":
        return
    if optimizer.lr_decay_updates is None and former["lr_decay_steps"] != end:
        yield (
            f"optimizer.lr_schedule={optimizer.lr_schedule}: it ends with the run, at update {end} "
            f"instead of {former['lr_decay_steps']}"
        )
