"""The choice of the responses of a group that reach the update, as keep-masks."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rl.algorithms.presets import SelectionName
from megatron_rl.ops.group_stats import KEEP_RULES, KeepRule

KeepMask = list[bool]
TieBreak = Callable[[], random.Random]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The usable responses of one group, as sampled: what every selection judges."""

    rewards: tuple[float, ...]
    lengths: tuple[int, ...]  # response tokens
    is_truncated: tuple[bool, ...]
    is_gold: tuple[bool, ...]


def keep_rules(names: Sequence[SelectionName]) -> list[KeepRule]:
    """The selections that judge rewards alone, which group_stats answers for all groups at once."""
    return [name for name in names if name in KEEP_RULES]


def keep_mask(
    candidates: Candidates,
    by_reward: KeepMask,
    names: Sequence[SelectionName],
    *,
    tie_break: TieBreak,
    overlong_tokens: int | None = None,
    balanced_size: int = 4,
    max_per_group: int | None = None,
) -> KeepMask:
    """True for each response that is kept after all named selections and the group's cap.

    Conditions on rewards (all wrong, the largest one) are about the group as sampled, so their
    place in the order does not matter; best_of_n, best_and_worst, balanced and max_per_group choose
    among the responses that are still kept.

    Args:
        candidates: the group.
        by_reward: what group_stats keeps under keep_rules(names).
        names: all selections.
        tie_break: what chooses among responses that are equally good.
        overlong_tokens: longest response that drop_overlong keeps.
        balanced_size: responses that balanced keeps.
        max_per_group: most responses that are kept.
    """
    keep = by_reward
    for name in names:
        if name == "best_of_n":
            keep = _best_of_n(candidates, keep, tie_break)
        elif name == "best_and_worst":
            keep = _best_and_worst(candidates, keep, tie_break)
        elif name == "balanced":
            keep = _balanced(candidates, keep, balanced_size)
        elif name == "drop_overlong":
            assert overlong_tokens is not None, "the config check lets no other through"
            fits = [length <= overlong_tokens for length in candidates.lengths]
            keep = _both(keep, fits)
        elif name in MASKS:
            keep = _both(keep, MASKS[name](candidates))
    return keep if max_per_group is None else _first(keep, max_per_group)


def _gold(candidates: Candidates) -> KeepMask:
    return list(candidates.is_gold)


def _drop_truncated(candidates: Candidates) -> KeepMask:
    return [not truncated for truncated in candidates.is_truncated]


MASKS: dict[SelectionName, Callable[[Candidates], KeepMask]] = {
    "gold": _gold,
    "drop_truncated": _drop_truncated,
}


def _best_of_n(candidates: Candidates, keep: KeepMask, tie_break: TieBreak) -> KeepMask:
    if not any(keep):
        return keep
    chosen = tie_break().choice(_with_reward(max, candidates, keep))
    return [index == chosen for index in range(len(keep))]


def _best_and_worst(candidates: Candidates, keep: KeepMask, tie_break: TieBreak) -> KeepMask:
    """The pair of a group with mixed outcomes; nothing of any other group."""
    kept = [reward for reward, is_kept in zip(candidates.rewards, keep, strict=True) if is_kept]
    if not kept or max(kept) <= 0 or min(kept) > 0:
        return [False] * len(keep)
    pair = [tie_break().choice(_with_reward(end, candidates, keep)) for end in (max, min)]
    return [index in pair for index in range(len(keep))]


def _balanced(candidates: Candidates, keep: KeepMask, size: int) -> KeepMask:
    """The first right and wrong ones, half and half; where one side has too few, the other's."""
    kept = [index for index, is_kept in enumerate(keep) if is_kept]
    right = [index for index in kept if candidates.rewards[index] > 0]
    wrong = [index for index in kept if candidates.rewards[index] <= 0]
    num_right = min(len(right), max(size // 2, size - len(wrong)))
    chosen = {*right[:num_right], *wrong[: size - num_right]}
    return [index in chosen for index in range(len(keep))]


def _with_reward(
    end: Callable[[list[float]], float], candidates: Candidates, keep: KeepMask
) -> list[int]:
    """Positions of the kept responses whose reward is the largest or smallest of them."""
    rewards = {index: r for index, r in enumerate(candidates.rewards) if keep[index]}
    wanted = end(list(rewards.values()))
    return [index for index, r in rewards.items() if r == wanted]


def _first(keep: KeepMask, limit: int) -> KeepMask:
    return [is_kept and sum(keep[:index]) < limit for index, is_kept in enumerate(keep)]


def _both(left: KeepMask, right: KeepMask) -> KeepMask:
    return [a and b for a, b in zip(left, right, strict=True)]
