"""An update whose prompts stand once in a row, against one whose responses each have their own.

    python benchmarks/shared_prompts.py --output benchmarks/results/shared_prompts.md

One process, one thread, both ways in turns on the same responses; processor seconds, and the ratio
of each turn. Tokens are those that go through the model.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from synthetic import SIZES, synthetic_groups
from update_time import CASES, make_trainer, write_models

ROW_TOKENS = 2048
TURNS, WARM_UP = 15, 2
SHAPES = {  # (prompts, responses to each, tokens of a prompt, of a response)
    "as SmolLM2 on word problems": (8, 8, 60, (15, 45)),
    "short prompts, longer responses": (8, 4, 24, (8, 95)),
    "as mathematics, a tenth as long": (8, 8, 20, (30, 180)),
    "long prompts": (4, 8, 300, (20, 100)),
}

HEAD = """# Prompts once for all of their responses, measured

`python benchmarks/shared_prompts.py --output benchmarks/results/shared_prompts.md`

Processor seconds of a policy update with `batching.share_prompts=true` by those of the same update
without, in turns: medians of {turns}, and quartiles. A random model of four layers, hidden size
256, {vocab} words, float32, rows of {row} tokens, one rank and one thread on a CPU{machine}.

| | prompts x responses | tokens of each | tokens through the model | seconds | ratio | quartiles |
|---|---|---|---|---|---|---|
"""


def seconds_in_turns(models: Path) -> Iterator[str]:
    """A line of the table for each shape."""
    from megatron_rl.megatron.enter import enter
    from megatron_rl.parallel.groups import init_distributed
    from megatron_rl.platforms.base import detect

    platform = detect()
    enter(platform)  # before the first import of megatron.core
    init_distributed(platform)
    case = CASES["one rank"]
    trainer, pack = make_trainer(case, models / case.family, row_tokens=ROW_TOKENS)
    for name, (prompts, responses, prompt_tokens, response_tokens) in SHAPES.items():
        rewards = [[1.0, -1.0] * (responses // 2)] * prompts
        groups = synthetic_groups(
            rewards, prompt_tokens=prompt_tokens, response_tokens=response_tokens
        )
        batches = {shares: pack(groups, share_prompts=shares) for shares in (False, True)}
        told: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(WARM_UP + TURNS):
            for shares in (False, True) if turn % 2 else (True, False):
                start = time.process_time()
                trainer.update(batches[shares])
                if turn >= WARM_UP:
                    told[shares].append(time.process_time() - start)
        ratios = [with_ / without for without, with_ in zip(*told.values(), strict=True)]
        first, _, third = quantiles(ratios, n=4)
        tokens = [
            sum(row.num_tokens for batch in batches[shares] for row in batch.microbatches)
            for shares in (False, True)
        ]
        yield (
            f"| {name} | {prompts} x {responses} | {prompt_tokens}, {response_tokens[0]} to "
            f"{response_tokens[1]} | {tokens[0]:,} to {tokens[1]:,} "
            f"| {median(told[False]):.2f} to {median(told[True]):.2f} "
            f"| {median(ratios):.2f} | {first:.2f} to {third:.2f} |"
        )


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--machine", default="", help="a word on the machine, for the page")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "1"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        for line in seconds_in_turns(Path(folder)):
            lines.append(line)
            print(line, flush=True)
    if args.output:
        machine = f" ({args.machine})" if args.machine else ""
        page = HEAD.format(turns=TURNS, vocab=SIZES["vocab_size"], row=ROW_TOKENS, machine=machine)
        args.output.write_text(page + "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
