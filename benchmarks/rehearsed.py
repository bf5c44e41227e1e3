"""What ranks of large jobs hold in an update: rehearsed, beside what `plan` has from sizes alone.

    python benchmarks/rehearsed.py --output benchmarks/results/rehearsed.md

Models and layouts are those of sizes.py that fit with offload. Of every layout a rank of the first
pipeline stage and one of the last are rehearsed, with local layers.
"""

import argparse
from pathlib import Path

from sizes import MODELS, recipe

from megatron_rl.config import RunConfig
from megatron_rl.memory import GIB, need_of
from megatron_rl.rehearsal.rank import rehearse
from megatron_rl.rehearsal.report import ranks_that_differ

# Model, ranks, TP, PP, EP, TP of the engine, whether layers are computed anew.
CASES = (
    ("Qwen2.5-7B", 8, 2, 1, 1, 1, False),
    ("Qwen2.5-32B", 8, 8, 1, 1, 2, False),
    ("Qwen2.5-72B", 32, 8, 2, 1, 4, False),
    ("Qwen3-30B-A3B", 8, 1, 1, 8, 2, True),
)
COLUMNS = "model|ranks|layout|rank|update, GiB|planned|stays while the engine generates|took"
HEAD = f"""# Rehearsed

`python benchmarks/rehearsed.py --output benchmarks/results/rehearsed.md`: what a rank holds of its
GPU at the peak of an update, rehearsed on a CPU, and what `plan` has for it from sizes alone (local
layers, bfloat16, optimizer state offloaded). No GPU has run these.

| {COLUMNS.replace("|", " | ")} |
{"|---" * 8}|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for model, world_size, tp, pp, ep, engine, recompute in CASES:
        settings = recipe("optimizer", tp, pp, ep, engine, recompute=recompute)
        settings["model"]["layer_spec"] = "local"
        config = RunConfig.model_validate(settings)
        arch, layout = MODELS[model], config.parallel.layout(world_size)
        planned = need_of(config, arch, layout, "cuda").update
        for rank in ranks_that_differ(layout, arch.num_layers):
            found = rehearse(config, arch, world_size, rank)
            peak = found.memory["update"]
            cut = f"TP {tp}, PP {pp}, EP {ep}, DP {layout.dp}"
            rows.append(
                f"| {model} | {world_size} | {cut} | {rank} | {peak / GIB:.1f} "
                f"| {planned / GIB:.1f} ({planned / peak:.2f}) | {found.stays / GIB:.1f} "
                f"| {found.seconds:.0f} s |\n"
            )
            options.output.write_text(HEAD + "".join(rows))


if __name__ == "__main__":
    main()
