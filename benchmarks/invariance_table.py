"""The table of benchmarks/results/gradient_invariance.md, from what the tests measured.

    for part in 1 2 3 4 5 6 7 8 9 10 11 12; do
        pytest -m exhaustive --measured=DIR --part=$part/12 \
            tests/distributed/test_gradient_invariance.py
    done
    pytest -m exhaustive --measured=DIR tests/distributed/test_critic_invariance.py
    python benchmarks/invariance_table.py DIR

Parts add to DIR, which is empty at first; one that failed is run again. Errors are relative to each
tensor's largest entry; a line has the largest over its cases, tensors and ranks.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def policy_lines(folder: Path) -> Iterator[str]:
    """A line a layout: token and pair losses of the policy."""
    layouts = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    layouts.sort(key=lambda layout: (layout["world"], layout["number"]))
    yield "| layout | ranks | cases | loss | gradients | optimizer's norm |"
    yield "|---|---|---|---|---|---|"
    for layout in layouts:
        place = f"| {layout['layout']} | {layout['world']} | {len(layout['cases'])} | "
        yield place + " | ".join(f"{x:.1e}" for x in _worst(layout["cases"])) + " |"
    everything = [row for layout in layouts for row in layout["cases"]]
    presets = {preset for row in everything for preset in re.findall(r"preset=(\w+)", row["case"])}
    loss, gradient, norm = _worst(everything)
    yield (
        f"\n{len(everything)} cases of {len(presets)} presets in {len(layouts)} layouts on up to "
        f"{max(layout['world'] for layout in layouts)} ranks; largest error of a loss {loss:.1e}, "
        f"of a gradient {gradient:.1e}, of a norm {norm:.1e}"
    )


def _worst(rows: list[dict[str, Any]]) -> list[float]:
    return [max(row[f"{what}_error"] for row in rows) for what in ("loss", "gradient", "norm")]


def critic_lines(folder: Path) -> Iterator[str]:
    """A line a layout: PPO's critic."""
    yield "| layout | values | loss | gradients | of the value head | optimizer's norm |"
    yield "|---|---|---|---|---|---|"
    for file in sorted(folder.glob("critic/*.json")):
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
