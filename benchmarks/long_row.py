"""One long row on a CPU, whole on one rank and shared by four: memory of a rank, and seconds.

    python benchmarks/long_row.py --output benchmarks/results/long_row_measured.md

A row is one sequence of 32,768 tokens, through one update of a narrow model with random weights, on
real ranks that have as many threads together as the machine has cores. Beside it what a rehearsal
of a GPU has for the same rank.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_rl.config import RunConfig
from megatron_rl.memory import GIB
from megatron_rl.weights.arch import ModelArch

TOKENS = 32768
SIZES = (1, 4)  # of context parallelism
ARCH = ModelArch(
    model_type="qwen2",
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=64,
    vocab_size=2048,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    max_position_embeddings=TOKENS,
    qkv_bias=True,
    tied_embeddings=False,
)
HEAD = """# A long row, measured

`python benchmarks/long_row.py --output benchmarks/results/long_row_measured.md`: one update of one
sequence of {tokens:,} tokens, supervised, in float32, with a model of {layers} layers of {width},
on CPU ranks that share {cores} cores. "Process" is the largest resident memory during the update
less that before it; "tensors" the largest sum of the memory of tensors less what was held before
(weights, gradients, main weights), counted op by op; both of the rank that has most. "Rehearsed" is
that sum for a GPU, where norms and attention are one kernel each. In float32 that kernel takes no
grouped queries: where ranks share the row, keys and values are repeated for every 512 queries and
kept, which at CP 4 is 1 GiB; in 16 bits, as long_rows.md has it, flash attention needs none of it.

| layout | process, GiB | tensors, GiB | rehearsed, GiB | seconds of the update | loss |
|---|---|---|---|---|---|
"""


def recipe(cp: int, tokens: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "none", "dtype": "float32"},
            "algorithm": {"preset": "sft"},
            "prompts": {"path": "none.jsonl", "prompts_per_iteration": 1, "max_prompt_tokens": 64},
            "rollout": {"max_response_tokens": tokens - 64},
            "batching": {"max_tokens_per_microbatch": tokens},
            "run": {"num_iterations": 1, "output_dir": "none"},
            "parallel": {"context_parallel_size": cp},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the row")
    parser.add_argument("--cp", type=int, nargs="+", default=SIZES, help="ranks that share it")
    parser.add_argument("--of-rank", type=int, metavar="CP", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of_rank:
        update_on_a_rank(recipe(options.of_rank, options.tokens), options.output)
        return
    cores = os.cpu_count() or 1
    sizes = {"layers": ARCH.num_layers, "width": ARCH.hidden_size}
    lines = [HEAD.format(tokens=options.tokens, cores=cores, **sizes)]
    for cp in options.cp:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(cp), __file__, "--of-rank", str(cp)]
            command += ["--tokens", str(options.tokens)]
            threads = {"OMP_NUM_THREADS": str(max(1, cores // cp))}
            subprocess.run([*command, "--output", folder], check=True, env=os.environ | threads)
            ranks = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
        process, tensors, seconds = (
            max(rank[name] for rank in ranks) for name in ("process", "tensors", "seconds")
        )
        planned = rehearsed(cp, options.tokens) / GIB
        lines.append(
            f"| CP {cp} | {process / GIB:.2f} | {tensors / GIB:.2f} | {planned:.2f} "
            f"| {seconds:.0f} | {ranks[0]['loss']:.9g} |\n"
        )
        options.output.write_text("".join(lines))


def rehearsed(cp: int, tokens: int) -> float:
    """What a GPU holds at the peak of the update beyond what it holds before it."""
    from megatron_rl.rehearsal.rank import rehearse

    found = rehearse(recipe(cp, tokens), ARCH, cp, 0)
    held = sum(nbytes for name, nbytes in found.held.items() if name != "Adam's moments")
    return found.memory["update"] - held


def update_on_a_rank(config: RunConfig, folder: Path) -> None:
    """One update on this rank; what it took is written down."""
    import torch

    from megatron_rl.megatron.enter import enter
    from megatron_rl.parallel.groups import init_distributed
    from megatron_rl.platforms.base import CPU

    enter(CPU)
    init_distributed(CPU)

    from megatron_rl.algorithms.algorithm import Algorithm
    from megatron_rl.megatron.groups import join
    from megatron_rl.policy.policy import Policy
    from megatron_rl.rehearsal.ledger import Storages
    from megatron_rl.rehearsal.rank import full_rows

    algorithm = Algorithm(config.algorithm)
    groups = join(CPU, config.parallel, 1)
    rows, _ = full_rows(config, algorithm, groups.layout, groups.here.cp_rank)
    with Storages("cpu") as storages:
        policy = Policy(
            ARCH,
            config.model,
            config.parallel,
            config.optimizer,
            groups,
            temperature=1.0,
            run_updates=1,
        )
        torch.manual_seed(0)
        for name, parameter in policy.named_parameters().items():
            if not name.endswith("norm.weight"):
                torch.nn.init.normal_(parameter, std=0.02)
        policy.prepare_training()
        held, resident, start = storages.mark(), status("VmRSS"), time.monotonic()
        metrics: Any = policy.update(rows, algorithm.loss()).metrics
        found = {
            "process": status("VmHWM") - resident,
            "tensors": storages.peak - held,
            "seconds": time.monotonic() - start,
            "loss": metrics["policy/loss"],
        }
    (folder / f"{groups.rank}.json").write_text(json.dumps(found))


def status(name: str) -> int:
    """A number of this process in bytes, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
