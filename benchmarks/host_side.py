"""Scheduling and group statistics, compiled, beside their definitions, in one process on a CPU.

    python benchmarks/host_side.py

Both of a pair get the same input, take turns, and must give the same answer. Filling rows is
quadratic in its definition, so that it gets a tenth of the sequences too.
"""

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import fields
from statistics import median
from typing import Any

import torch
from measure import describe_machine, load_average

from megatron_rl.batching.balance import (
    balance,
    balance_definition,
    fill_rows,
    fill_rows_definition,
)
from megatron_rl.ops.group_stats import group_stats, group_stats_definition

ROW_TOKENS, RANKS, GROUP_SIZE = 16_384, 64, 8
Pair = tuple[Callable[[], object], Callable[[], object] | None]


def pairs(sequences: int, groups: int) -> dict[str, Pair]:
    """Name -> what is compiled, and its definition."""
    draw = random.Random(0)
    lengths = [draw.randrange(100, 8193) for _ in range(sequences)]
    few = lengths[: sequences // 10]
    rewards = torch.randint(
        0, 2, (groups * GROUP_SIZE,), generator=torch.Generator().manual_seed(0)
    ).double()
    offsets = torch.arange(0, len(rewards) + 1, GROUP_SIZE)

    def stats(function: Callable[..., object]) -> Callable[[], object]:
        return lambda: function(
            rewards, offsets, keep=("drop_uniform",), advantage="group_norm", std_eps=1e-6
        )

    return {
        f"balance {len(lengths):,} sequences over {RANKS} ranks": (
            lambda: balance(lengths, RANKS),
            lambda: balance_definition(lengths, RANKS),
        ),
        f"fill rows of {ROW_TOKENS:,} with {len(few):,} sequences": (
            lambda: fill_rows(few, ROW_TOKENS),
            lambda: fill_rows_definition(few, ROW_TOKENS),
        ),
        f"fill rows of {ROW_TOKENS:,} with {len(lengths):,} sequences": (
            lambda: fill_rows(lengths, ROW_TOKENS),
            None,
        ),
        f"statistics, keep-mask and advantages of {groups:,} groups of {GROUP_SIZE}": (
            stats(group_stats),
            stats(group_stats_definition),
        ),
    }


def equal(ours: Any, theirs: Any) -> bool:
    """Schedules exactly; statistics to the rounding of float64."""
    if isinstance(ours, list):
        return ours == theirs
    names = [f.name for f in fields(ours)]
    return all(
        torch.allclose(getattr(ours, name).double(), getattr(theirs, name).double(), rtol=1e-12)
        for name in names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()
    for name, value in describe_machine("cpu").items():
        print(f"{name}: {value}")
    print(f"\n{'median ms':64s}{'compiled':>10s}{'definition':>12s}{'ratio':>8s}")
    for name, pair in pairs(args.sequences, args.groups).items():
        calls = [call for call in pair if call is not None]
        answers = [call() for call in calls]
        if not all(equal(answers[0], answer) for answer in answers[1:]):
            raise SystemExit(f"not measured, the answers differ: {name}")
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(args.samples):
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(1e3 * (time.perf_counter() - start))
        found = [median(taken) for taken in times]
        line = f"{name:64s}{found[0]:10.2f}"
        print(line + (f"{found[1]:12.2f}{found[1] / found[0]:8.1f}" if found[1:] else ""))
    print(f"load after: {load_average()}")


if __name__ == "__main__":
    main()
