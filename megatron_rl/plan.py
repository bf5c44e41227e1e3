"""`plan`: what a recipe means, before any rank is started; no GPU and no process group."""

import os
from collections.abc import Iterator

import torch

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.config import RunConfig, world_problems
from megatron_rl.errors import ConfigErrors
from megatron_rl.input_report import input_lines
from megatron_rl.megatron.refusals import model_problems
from megatron_rl.parallel.layout import EngineLayout, Layout
from megatron_rl.preflight import read_data
from megatron_rl.rollout.refusals import engine_problems
from megatron_rl.weights.arch import ModelArch, padded_vocab_size
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.layouts import expert_pieces, shared_pieces
from megatron_rl.weights.model_source import find_model
from megatron_rl.weights.pieces import size
from megatron_rl.weights.sync import plan_sync

GIB = 2**30
RANKS_PER_NODE = 8


def print_plan(config: RunConfig) -> None:
    """Print every derived value.

    Raises:
        ConfigErrors: the layout does not fit the model or the number of ranks.
    """
    world = _world_size(config)
    model_dir = find_model(config.model.path, "model.path").config_dir
    arch = read_model_config(model_dir, config.model.ignore_config_fields)
    problems = [*world_problems(config, world), *model_problems(arch, config.parallel)]
    if not config.is_supervised:
        problems += engine_problems(arch, config.rollout.tensor_model_parallel_size)
    if problems:
        raise ConfigErrors([str(problem) for problem in problems])
    layout = config.parallel.layout(world)
    for section, lines in (
        ("layout", _layout(config, arch, layout)),
        ("iteration", _iteration(config)),
        ("passes", _passes(config)),
        ("memory per rank", _memory(config, arch, layout)),
        ("weight sync", _sync(config, arch, layout)),
    ):
        print(section)
        for name, value in lines:
            print(f"  {name:34s} {value}")


def print_inputs(config: RunConfig) -> None:
    """Print what a run of the recipe would read, with its first prompt as text and as tokens.

    Raises:
        ConfigErrors: what a start would refuse in data or tokenizer.
    """
    tokenizer, prompts, benchmarks = read_data(config)
    print("inputs")
    for line in input_lines(config, tokenizer, prompts, benchmarks):
        print(f"  {line}")


def _world_size(config: RunConfig) -> int:
    started = os.environ.get("WORLD_SIZE")
    return config.parallel.world_size or (int(started) if started else config.smallest_world)


def _layout(config: RunConfig, arch: ModelArch, layout: Layout) -> Iterator[tuple[str, str]]:
    yield "model", f"{arch.model_type}, {arch.num_parameters:,} parameters"
    yield (
        "ranks",
        f"{layout.world_size} = TP {layout.tp} x PP {layout.pp} x DP {layout.dp}"
        + (f", {layout.vpp} chunks a rank" if layout.vpp > 1 else ""),
    )
    if arch.mixture is not None:
        yield (
            "experts",
            f"{arch.mixture.num_experts} a layer, over EP {layout.ep}; expert TP {layout.etp}",
        )
    layers = arch.num_layers // (layout.pp * layout.vpp)
    yield "layers per chunk", f"{layers} of {arch.num_layers}"
    yield (
        "vocabulary",
        f"{arch.vocab_size} padded to {padded_vocab_size(arch.vocab_size, layout.tp)}",
    )
    if not config.is_supervised:
        rollout_tp = config.rollout.tensor_model_parallel_size
        engines = layout.world_size // rollout_tp
        yield "rollout engines", f"{engines} of TP {rollout_tp}, {config.engine_dtype}"


def _iteration(config: RunConfig) -> Iterator[tuple[str, str]]:
    prompts = config.prompts.prompts_per_iteration
    group = 1 if config.is_supervised else config.rollout.group_size
    each = config.optimizer.prompts_per_update or prompts
    yield "responses", f"{prompts} prompts x {group} = {prompts * group}"
    yield "longest sequence", f"{config.longest_sequence} tokens"
    yield "packed row", f"up to {config.row_tokens} tokens; as many rows as kept samples fill"
    yield (
        "optimizer steps",
        f"{config.num_updates} mini-batches of {each} prompts x {config.optimizer.epochs} epochs",
    )
    steps = config.run.num_iterations * config.num_updates * config.optimizer.epochs
    yield "whole run", f"{config.run.num_iterations} iterations, at most {steps} optimizer steps"


def _passes(config: RunConfig) -> Iterator[tuple[str, str]]:
    from megatron_rl.policy.passes import plan_passes

    algorithm = Algorithm(config.algorithm)
    choice = algorithm.choice
    yield from (("notice", text) for text in config.algorithm.notices)
    yield "algorithm", config.algorithm.preset
    yield (
        "selection",
        f"{', '.join(choice.selection)}; what is not kept reaches no pass of the update",
    )
    yield "advantage", choice.advantage
    yield "objective", f"{choice.objective}, {choice.loss_aggregation}"
    yield from plan_passes(
        algorithm,
        num_updates=config.num_updates,
        epochs=config.optimizer.epochs,
        critic_warmup=config.critic.warmup_updates,
    ).reasons
    if config.metrics.kl_every and not config.is_supervised:
        yield (
            "KL measurement",
            f"{config.metrics.kl_rollouts} rollouts every {config.metrics.kl_every} iterations",
        )


def _memory(config: RunConfig, arch: ModelArch, layout: Layout) -> Iterator[tuple[str, str]]:
    """Estimates from sizes alone; what allocators and libraries add is not in them."""
    itemsize = _itemsize(config.model.dtype)
    shared, experts = _busiest_rank(arch, layout)
    params = shared + experts
    held = params
    if config.optimizer.use_distributed_optimizer:
        held = shared // layout.dp + experts // layout.expert_dp
    # Adam's two moments; 16-bit weights have float32 main weights and moments, 4 bytes each.
    optimizer = held * (12 if itemsize == 2 else 2 * itemsize)
    rows = config.row_tokens
    # Korthikanti et al. 2022, arXiv:2205.05198, eq. 4 without the attention scores: 34 bytes per
    # token and hidden unit in a 16-bit layer.
    per_layer = 34 * itemsize / 2 * rows * arch.hidden_size / layout.tp
    layers = arch.num_layers // layout.pp
    activations = (
        2 * itemsize / 2 * rows * arch.hidden_size * layers + per_layer
        if config.model.recompute_granularity == "full"
        else per_layer * layers
    )
    vocab = padded_vocab_size(arch.vocab_size, layout.tp) // layout.tp
    parts = {
        "weights": params * itemsize,
        "gradients": params * (4 if itemsize == 2 else itemsize),
        "optimizer": optimizer,
        "activations of one row (estimate)": activations * min(layout.pp, 4),
        "logits of one chunk": 1024 * vocab * (itemsize + 4),
    }
    if config.algorithm.resolved.needs_critic:
        # Without the LM head; what is alive of one row at a time is counted above.
        head = vocab * arch.hidden_size
        parts["critic, with its optimizer"] = (params - head) * sum(
            parts[name] / params for name in ("weights", "gradients", "optimizer")
        )
    if not config.is_supervised:
        engine_bytes = _itemsize(config.engine_dtype) * arch.num_parameters
        parts["engine weights"] = engine_bytes / config.rollout.tensor_model_parallel_size
    for name, nbytes in parts.items():
        yield name, f"{nbytes / GIB:.3f} GiB"
    yield "sum", f"{sum(parts.values()) / GIB:.3f} GiB, without the key/value cache"
    if Algorithm(config.algorithm).needs_ref_logprobs or config.metrics.kl_every:
        yield "reference weights", f"{params * itemsize / GIB:.3f} GiB of host memory"


def _busiest_rank(arch: ModelArch, layout: Layout) -> tuple[int, int]:
    """Parameters of the rank that holds most: those outside of experts, and those of experts."""
    held = [
        (
            shared_pieces(arch, layout, tp_rank=0, pp_rank=stage),
            expert_pieces(arch, layout, etp_rank=0, ep_rank=0, pp_rank=stage),
        )
        for stage in range(layout.pp)
    ]
    counts = [
        (sum(size(p.box) for p in shared), sum(size(p.box) for p in experts))
        for shared, experts in held
    ]
    return max(counts, key=sum)


def _sync(config: RunConfig, arch: ModelArch, layout: Layout) -> Iterator[tuple[str, str]]:
    if config.is_supervised:
        yield "none", "supervised training has no engine"
        return
    engines = EngineLayout(
        world_size=layout.world_size, tp=config.rollout.tensor_model_parallel_size
    )
    stats = plan_sync(
        arch,
        layout,
        engines,
        rank=0,
        itemsize=_itemsize(config.engine_dtype),
        mib=config.weights.bucket_mib,
        nodes=[rank // RANKS_PER_NODE for rank in range(layout.world_size)],
    ).stats
    for name, nbytes in (
        ("engine shard", stats.need_max),
        ("received by the busiest rank", stats.received_max),
        ("sent by the busiest rank", stats.sent_max),
        ("on the wire, all ranks", stats.wire_total),
        (f"between nodes of {RANKS_PER_NODE}", stats.between_nodes),
    ):
        yield name, f"{nbytes / 2**20:.3f} MiB"
    yield "buckets", f"{stats.num_buckets} of up to {config.weights.bucket_mib} MiB"


def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)
