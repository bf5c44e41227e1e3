"""Sharing out by length: samples over data-parallel replicas, a replica's samples over packed rows.

Both are pure functions of lengths, so that every rank computes the same answer.
"""

import heapq
import importlib.util
from collections.abc import Sequence

BUILT = importlib.util.find_spec("megatron_rl._scheduling") is not None
"""True where the compiled functions are there; the Python definitions say what they must equal."""

if BUILT:
    import megatron_rl._scheduling as _scheduling


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of each of `parts` shares with nearly equal token sums; shares may be empty.

    Longest first, each to the share that has least (Graham 1969: at most 4/3 of the optimum).
    Indices within a share ascend. Example: lengths 5, 4, 3 in 2 parts are [[0], [1, 2]].
    """
    if BUILT:
        shares: list[list[int]] = _scheduling.balance(lengths, parts)
        return shares
    return balance_definition(lengths, parts)


def balance_definition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The shares as the compiled balance must give them; this runs where it was not built."""
    loads = [(0, part) for part in range(parts)]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, part = heapq.heappop(loads)
        shares[part].append(index)
        heapq.heappush(loads, (load + lengths[index], part))
    return [sorted(share) for share in shares]


def fill_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of each packed row of at most `budget` tokens: first fit, longest first.

    A length over the budget has a row of its own. Indices within a row ascend. Example: lengths 6,
    5, 4, 3, 2 at a budget of 10 are [[0, 2], [1, 3, 4]].
    """
    if BUILT:
        rows: list[list[int]] = _scheduling.fill_rows(lengths, budget)
        return rows
    return fill_rows_definition(lengths, budget)


def fill_rows_definition(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The rows as the compiled fill_rows must give them; this runs where it was not built."""
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
