"""What ranks of large jobs hold in an update: rehearsed, beside what `plan` has from sizes alone.

    python benchmarks/rehearsed.py --output benchmarks/results/rehearsed.md
    python benchmarks/rehearsed.py --long --output benchmarks/results/long_rows.md

Models and layouts are those of sizes.py that fit with offload. Of every layout a rank of the first
pipeline stage and one of the last are rehearsed, with local layers. --long: one sequence a row, and
ranks that share it.
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
# Model, tokens of a sequence, TP, CP, whether layers are computed anew; TP x CP ranks.
LONG_CASES = (
    ("Qwen2.5-7B", 32768, 4, 1, False),
    ("Qwen2.5-7B", 32768, 4, 2, False),
    ("Qwen2.5-7B", 32768, 4, 4, False),
)
LONG_COLUMNS = "model|tokens|layout|update, GiB|planned|keys and values sent to a rank, GiB|took"
LONG_HEAD = f"""# Long rows

`python benchmarks/rehearsed.py --long --output benchmarks/results/long_rows.md`: a row is one
sequence, which the CP ranks share. What a rank holds of its GPU at the peak of an update, rehearsed
on a CPU, and what `plan` has for it (local layers, bfloat16, optimizer state offloaded); the bytes
that all-gathers of keys and values bring to it, of all rows, forward and backward. No GPU has run
these.

| {LONG_COLUMNS.replace("|", " | ")} |
{"|---" * 7}|
"""
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
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    if options.long:
        rehearse_long_rows(options.output)
        return
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


def rehearse_long_rows(output: Path) -> None:
    rows = []
    for model, tokens, tp, cp, recompute in LONG_CASES:
        settings = recipe("optimizer", tp, 1, 1, tp, recompute=recompute)
        settings["model"]["layer_spec"] = "local"
        settings["parallel"]["context_parallel_size"] = cp
        settings["prompts"] |= {"prompts_per_iteration": 2, "max_prompt_tokens": 1024}
        settings["rollout"] |= {"group_size": 2, "max_response_tokens": tokens - 1024}
        settings["batching"]["max_tokens_per_microbatch"] = tokens
        config = RunConfig.model_validate(settings)
        arch, world_size = MODELS[model], tp * cp
        layout = config.parallel.layout(world_size)
        planned = need_of(config, arch, layout, "cuda").update
        found = rehearse(config, arch, world_size, 0)
        peak = found.memory["update"]
        sent = found.collectives["update"].get(f"all-gather, CP {cp}", (0, 0))[1]
        rows.append(
            f"| {model} | {tokens} | TP {tp}, CP {cp} | {peak / GIB:.1f} "
            f"| {planned / GIB:.1f} ({planned / peak:.2f}) | {sent * (cp - 1) / cp / GIB:.1f} "
            f"| {found.seconds:.0f} s |\n"
        )
        output.write_text(LONG_HEAD + "".join(rows))


if __name__ == "__main__":
    main()
