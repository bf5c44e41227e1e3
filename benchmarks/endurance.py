"""Memory, descriptors, threads and seconds of a long run, rank by rank.

    python benchmarks/endurance.py --iterations 1000 --folder /tmp/endurance \
        --output benchmarks/results/endurance.md

Two data-parallel ranks of the quickstart's model, under torchrun; a checkpoint every 50 iterations.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from launched import make_model, num_records, ranks_of, recipe_of, start

LOOKS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    output = options.folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    recipe = recipe_of(
        make_model(options.folder / "model"),
        output,
        options.iterations,
        algorithm={"preset": "reinforce_rej"},
        rollout={"group_size": 4},
        checkpoint={"save_every": 50},
    )
    launcher = start(recipe, 2, options.folder / "run.log", mark=str(options.folder))
    seen: dict[int, dict[str, tuple[int, int, int]]] = {}
    step = options.iterations // LOOKS
    while launcher.poll() is None:
        done = num_records(output)
        if done // step > len(seen):
            seen[done] = {rank: look(pid) for pid, rank in ranks_of(str(options.folder)).items()}
        time.sleep(0.2)
    assert launcher.returncode == 0, (options.folder / "run.log").read_text()[-3000:]
    seconds = [
        json.loads(line)["time/iteration_s"]
        for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    text = report(seen, seconds, step)
    print(text)
    if options.output:
        options.output.write_text(text)


def look(pid: int) -> tuple[int, int, int]:
    """(MiB resident, open descriptors, threads) of a process."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    descriptors = len(list((proc / "fd").iterdir()))
    return int(status["VmRSS"].split()[0]) // 1024, descriptors, int(status["Threads"])


def report(
    seen: dict[int, dict[str, tuple[int, int, int]]], seconds: list[float], step: int
) -> str:
    ranks = sorted(next(iter(seen.values())))
    lines = [
        "# A long run",
        "",
        f"`benchmarks/endurance.py --iterations {len(seconds)}`: DP 2, reinforce_rej, 64 responses "
        "an iteration, a checkpoint every 50.",
        "",
        "| iteration | "
        + " | ".join(f"rank {r}: MiB, descriptors, threads" for r in ranks)
        + f" | median s of the last {step} |",
        "|---" * (len(ranks) + 2) + "|",
    ]
    for iteration, found in seen.items():
        last = seconds[max(0, iteration - step) : iteration]
        cells = [", ".join(map(str, found[rank])) for rank in ranks]
        lines.append(f"| {iteration} | {' | '.join(cells)} | {median(last):.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
