"""Which models fit which number of GPUs, with and without offload: by the sums that `plan` prints.

    python benchmarks/sizes.py --output benchmarks/results/sizes.md

For each model and number of ranks every sensible layout is tried, and the one is taken whose larger
sum is smallest where none fits, else the one that cuts the model least. Nothing is built or run.
"""

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rl.config import RunConfig, problems, world_problems
from megatron_rl.fit import Fit, fit, free_on_planned
from megatron_rl.megatron.refusals import model_problems
from megatron_rl.memory import GIB, host_bytes_of_offload
from megatron_rl.plan import H100_GIB, RANKS_PER_NODE
from megatron_rl.rollout.refusals import engine_problems
from megatron_rl.weights.arch import MixtureArch, ModelArch

OFFLOADS = ("none", "optimizer", "weights")
LARGEST_SHARD, SMALLEST_SHARD = 36 * GIB, 4 * GIB  # of an engine's weights on a GPU
WORLDS = (8, 16, 32, 64, 128, 256, 512)


QWEN = ModelArch(
    model_type="qwen2",
    num_layers=28,
    hidden_size=3584,
    ffn_hidden_size=18944,
    num_attention_heads=28,
    num_query_groups=4,
    head_dim=128,
    vocab_size=152064,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_scaling_factor=None,
    max_position_embeddings=131072,
    qkv_bias=True,
    tied_embeddings=False,
)


def dense(layers: int, hidden: int, ffn: int, heads: int) -> ModelArch:
    return replace(
        QWEN,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
    )


def experts(layers: int, hidden: int, heads: int, expert: int) -> ModelArch:
    return replace(
        QWEN,
        model_type="qwen3_moe",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=heads,
        vocab_size=151936,
        max_position_embeddings=40960,
        qkv_bias=False,
        qk_norm=True,
        mixture=MixtureArch(num_experts=128, ffn_hidden_size=expert, top_k=8, renormalized=True),
    )


MODELS = {  # by the config.json of their publisher
    "Qwen2.5-7B": QWEN,
    "Qwen2.5-32B": dense(64, 5120, 27648, 40),
    "Qwen2.5-72B": dense(80, 8192, 29568, 64),
    "Qwen3-30B-A3B": experts(48, 2048, 32, 768),
    "Qwen3-235B-A22B": experts(94, 4096, 64, 1536),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """The layout taken, and how it fares."""

    config: RunConfig
    fit: Fit

    @property
    def layout(self) -> str:
        parallel = self.config.parallel
        parts = {
            "TP": parallel.tensor_model_parallel_size,
            "PP": parallel.pipeline_model_parallel_size,
            "EP": parallel.expert_model_parallel_size,
        }
        cut = [f"{name} {size}" for name, size in parts.items() if size > 1] or ["DP only"]
        if self.config.model.recompute_granularity:
            cut.append("recompute")
        return ", ".join((*cut, f"engine TP {self.config.rollout.tensor_model_parallel_size}"))

    @property
    def rank(self) -> tuple[Any, ...]:
        """The smaller, the better."""
        parallel, share = self.config.parallel, self.fit.share
        if share > 1:
            return (True, share)
        cut = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        return (
            False,
            self.config.model.recompute_granularity is not None,
            parallel.pipeline_model_parallel_size,
            cut,
            parallel.expert_model_parallel_size,
            self.config.rollout.tensor_model_parallel_size,
        )


def recipe(
    offload: str, tp: int, pp: int, ep: int, engine: int, *, recompute: bool
) -> dict[str, Any]:
    model = {"path": "none", "dtype": "bfloat16", "layer_spec": "transformer_engine"}
    if recompute:
        model |= {"recompute_granularity": "full", "recompute_method": "uniform"}
        model |= {"recompute_num_layers": 1}
    experts = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 1}
    return {
        "run": {"output_dir": "none", "num_iterations": 1},
        "model": model,
        "prompts": {"path": "none", "prompts_per_iteration": 512, "max_prompt_tokens": 1024},
        "rollout": {
            "engine": "vllm",
            "group_size": 8,
            "max_response_tokens": 8192,
            "tensor_model_parallel_size": engine,
        },
        "algorithm": {"preset": "grpo"},
        "optimizer": {"offload": offload},
        "batching": {"max_tokens_per_microbatch": 16384},
        "parallel": {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "sequence_parallel": tp > 1,
            **(experts if ep > 1 else {}),
        },
    }


def candidates(arch: ModelArch, world: int, offload: str) -> Iterator[RunConfig]:
    experts = (8, 16, 32) if arch.mixture else (1,)
    for pp, tp, ep, engine, recompute in itertools.product(
        (1, 2, 4, 8), (1, 2, 4, 8), experts, (1, 2, 4, 8, 16), (False, True)
    ):
        if tp * pp > world or (ep > 1 and pp * ep > world):
            continue
        is_shard = engine == 8 or arch.num_parameters * 2 / engine < LARGEST_SHARD
        if engine > 8 and arch.num_parameters * 2 / 8 < LARGEST_SHARD:
            continue  # an engine of two nodes only where one of eight ranks is full of weights
        if not is_shard or (engine < 8 and arch.num_parameters * 4 / engine < SMALLEST_SHARD):
            continue
        config = RunConfig.model_validate(recipe(offload, tp, pp, ep, engine, recompute=recompute))
        found = itertools.chain(
            problems(config),
            world_problems(config, world),
            model_problems(arch, config.parallel),
            engine_problems(arch, engine),
        )
        if next(found, None) is None:
            yield config


def best(arch: ModelArch, world: int, offload: str) -> Found:
    free = free_on_planned(H100_GIB)
    tried = (
        Found(config=config, fit=fit(config, arch, world, "cuda", free))
        for config in candidates(arch, world, offload)
    )
    return min(tried, key=lambda found: found.rank)


def rows(name: str, arch: ModelArch) -> Iterator[str]:
    for world in WORLDS:
        for offload in OFFLOADS:
            found = best(arch, world, offload)
            need, config = found.fit.need, found.config
            assert found.fit.free is not None
            free = found.fit.free.per_rank
            over = max(need.update, need.generation, *need.instead.values()) - free
            host = host_bytes_of_offload(config, arch, config.parallel.layout(world), "cuda")
            verdict = "fits" if found.fit.share <= 1 else f"{over / GIB:.1f} too much"
            yield (
                f"| {name} | {world} | {offload} | {found.layout} | {need.update / GIB:.1f} | "
                f"{need.generation / GIB:.1f} | {host * RANKS_PER_NODE / GIB:.0f} | {verdict} |"
            )
            if found.fit.share <= 1 and world > 8 and offload == "none":
                return  # more ranks fit as well


HEAD = f"""# What fits how many H100, by the two sums of `plan`

```
python benchmarks/sizes.py --output benchmarks/results/sizes.md
```

From sizes alone: **nothing of this has run on a GPU**. GiB of the busiest rank, of {H100_GIB} that
a GPU of 80 GB has and {free_on_planned(H100_GIB).nbytes / GIB:.1f} that are counted on (the rest is
taken to be CUDA's, NCCL's and the allocator's; that is not measured). bfloat16, Transformer
Engine's layers, distributed optimizer, `grpo` with 512 prompts of 8 responses of up to 8,192 tokens
after prompts of up to 1,024, one update an iteration, rows of 16,384 tokens,
`rollout.gpu_memory_utilization=0.5`. Of TP and PP up to 8, EP up to 32 and engine TP up to 8, with
and without recompute, the layout is shown that fits without recompute, with the shortest pipeline
and the smallest cut; where none fits, the one with the smallest larger sum. A model is listed up to
the first number of GPUs, beyond one node, that it fits without offload. Host GiB are those that a
node of {RANKS_PER_NODE} ranks keeps for what left.

| model | GPUs | optimizer.offload | layout | update | rollout | host GiB | |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    output: Path = parser.parse_args().output
    lines = []
    for name, arch in MODELS.items():
        for row in rows(name, arch):
            print(row, flush=True)
            lines.append(row)
    output.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
