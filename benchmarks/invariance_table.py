"""The table of benchmarks/results/gradient_invariance.md, from what the tests measured.

    pytest -m exhaustive --basetemp=DIR tests/distributed/test_gradient_invariance.py \
        tests/distributed/test_critic_invariance.py
    python benchmarks/invariance_table.py DIR

DIR is emptied by pytest first. Errors are relative to each tensor's largest entry; a line has the
largest over its cases, tensors and ranks.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def policy_lines(folder: Path) -> Iterator[str]:
    """A line a layout: token and pair losses of the policy."""
    layouts: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("measured?/*.json")):
        for row in json.loads(file.read_text()):
            layouts.setdefault(row["layout"], []).append(row)
    yield "| layout | cases | loss | gradients | optimizer's norm |"
    yield "|---|---|---|---|---|"
    for layout, rows in layouts.items():
        worst = [max(row[f"{what}_error"] for row in rows) for what in ("loss", "gradient", "norm")]
        yield f"| {layout} | {len(rows)} | " + " | ".join(f"{x:.1e}" for x in worst) + " |"
    everything = [row for rows in layouts.values() for row in rows]
    yield (
        f"{len(everything)} cases in {len(layouts)} layouts, largest gradient error "
        f"{max(row['gradient_error'] for row in everything):.1e}"
    )


def critic_lines(folder: Path) -> Iterator[str]:
    """A line a layout: PPO's critic."""
    yield "| layout | values | loss | gradients | of the value head | optimizer's norm |"
    yield "|---|---|---|---|---|---|"
    for file in sorted(folder.glob("values?/*.json")):
        for layout, cases in json.loads(file.read_text()).items():
            keys = ("values", "loss", "gradient", "head", "norm")
            worst = [max(case[key] for case in cases.values()) for key in keys]
            yield f"| {layout} | " + " | ".join(f"{x:.1e}" for x in worst) + " |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for lines in (policy_lines(folder), critic_lines(folder)):
        print(*lines, sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
