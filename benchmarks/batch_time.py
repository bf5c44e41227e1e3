r"""What the host spends between rewards and the first forward pass: selecting and packing a batch.

    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc-per-node 2 \
        benchmarks/batch_time.py

Every rank owns its share of graded groups, half of which are mixed; all of it is what a run does
(selection, advantages, totals and balancing over the ranks, samples that travel, packed rows), and
nothing of it needs a GPU, which waits meanwhile. Prompts of 200 tokens.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

from megatron_rl.megatron.enter import enter
from megatron_rl.megatron.groups import join
from megatron_rl.parallel.groups import init_distributed
from megatron_rl.platforms.base import detect

PLATFORM = detect()
enter(PLATFORM)  # before the first import of megatron.core

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from measure import describe_machine  # noqa: E402
from synthetic import synthetic_groups  # noqa: E402

from megatron_rl.algorithms.algorithm import Algorithm  # noqa: E402
from megatron_rl.algorithms.config import AlgorithmConfig  # noqa: E402
from megatron_rl.algorithms.selector import Selector  # noqa: E402
from megatron_rl.batching.packer import Packer  # noqa: E402
from megatron_rl.parallel.config import ParallelConfig  # noqa: E402
from megatron_rl.parallel.groups import Groups  # noqa: E402
from megatron_rl.types import RolloutGroup  # noqa: E402

PROMPT_TOKENS, RESPONSE_TOKENS = 200, (20, 2000)
ROW_TOKENS, UPDATES = 16_384, 2
PRESETS = ("reinforce_rej", "grpo", "raft_pp")


def batch_of(count: int, group_size: int) -> list[RolloutGroup]:
    """Groups with right and wrong responses, and as many with right ones alone."""
    wrong = group_size // 2
    kinds = ([1.0] * (group_size - wrong) + [-1.0] * wrong, [1.0] * group_size)
    return synthetic_groups(
        (kinds[number % 2] for number in range(count)),
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=RESPONSE_TOKENS,
    )


def steps(
    groups: Groups, batch: Sequence[RolloutGroup], preset: str, *, share_prompts: bool
) -> tuple[Callable[[], object], Callable[[object], object]]:
    """Selecting from the batch, and packing what was selected."""
    algorithm = Algorithm(AlgorithmConfig.model_validate({"preset": preset}))
    selector = Selector(
        algorithm=algorithm,
        world=groups.world,
        prompts_per_update=len(batch) // UPDATES,
        run_seed=0,
        report=lambda values: None,
    )
    packer = Packer(
        groups,
        algorithm,
        row_tokens=ROW_TOKENS,
        row_multiple=1,
        max_response_tokens=RESPONSE_TOKENS[1],
        dtype=torch.float32,
        share_prompts=share_prompts,
    )
    own = batch[groups.rank :: groups.layout.world_size]
    prompts = [group.prompt for group in batch]
    return (
        lambda: selector.select(own, prompts, 1),
        lambda selection: packer.pack(selection, UPDATES),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=10)
    args = parser.parse_args()
    init_distributed(PLATFORM)
    groups = join(PLATFORM, ParallelConfig(), 1)
    batch = batch_of(args.groups, args.group_size)
    if groups.is_main:
        machine = ", ".join(f"{name} {value}" for name, value in describe_machine("cpu").items())
        print(f"{machine}, {groups.layout.world_size} ranks")
        print(f"{args.groups} groups of {args.group_size}, median ms of {args.samples}")
        print(f"{'preset':16s}{'prompts':12s}{'select':>10s}{'pack':>10s}")
    for preset in PRESETS:
        for share_prompts in (False, True):
            select, pack = steps(groups, batch, preset, share_prompts=share_prompts)
            taken: list[tuple[float, float]] = []
            for _ in range(args.samples + 1):
                dist.barrier()
                start = time.perf_counter()
                selection = select()
                selected = time.perf_counter()
                pack(selection)
                taken.append((selected - start, time.perf_counter() - selected))
            if groups.is_main:
                found = [1e3 * median(times) for times in zip(*taken[1:], strict=True)]
                prompts = "once" if share_prompts else "repeated"
                print(f"{preset:16s}{prompts:12s}{found[0]:10.1f}{found[1]:10.1f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
