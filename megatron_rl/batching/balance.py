"""Who trains what: samples over data-parallel ranks, and a rank's samples over packed rows.

Both are pure functions of lengths, so that every rank computes the same answer.
"""

import heapq
import importlib.util
from collections.abc import Sequence

BUILT = importlib.util.find_spec("megatron_rl._scheduling") is not None
"""Whether the compiled versions run; the Python ones are what they must equal."""

if BUILT:
    import megatron_rl._scheduling as _scheduling


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of each of `parts` shares with nearly equal token sums; shares may be empty.

    Longest first, each to the share that has least (Graham 1969: at most 4/3 of the optimum).
    Indices within a share ascend.
    """
    if BUILT:
        shares: list[list[int]] = _scheduling.balance(lengths, parts)
        return shares
    return balance_definition(lengths, parts)


def balance_definition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """What the compiled balance must equal, and what runs where there is none."""
    loads = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(loads)
        shares[part].append(index)
        heapq.heappush(loads, (load + lengths[index], part))
    return [sorted(share) for share in shares]


def fill_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of each row of at most `budget` tokens: first fit, longest first.

    A length over the budget has a row of its own. Indices within a row ascend.
    """
    if BUILT:
        rows: list[list[int]] = _scheduling.fill_rows(lengths, budget)
        return rows
    return fill_rows_definition(lengths, budget)


def fill_rows_definition(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """What the compiled fill_rows must equal, and what runs where there is none."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, space in enumerate(free) if space >= lengths[index]), None)
        if row is None:
            rows.append([])
            free.append(budget)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= lengths[index]
    return [sorted(row) for row in rows]
