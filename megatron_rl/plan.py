"""`plan`: what a recipe means, before any rank is started; no GPU and no process group."""

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.auto_engine import with_engine
from megatron_rl.auto_layout import choose_layout
from megatron_rl.choose import choices
from megatron_rl.config import RunConfig, world_problems
from megatron_rl.errors import ConfigError, ConfigErrors, InputError
from megatron_rl.fit import (
    HOPELESS,
    Fit,
    Free,
    fit,
    free_here,
    free_on_planned,
    refuse_what_cannot_fit,
    typed,
    ways_out,
)
from megatron_rl.input_report import input_lines
from megatron_rl.megatron.refusals import (
    layer_problems,
    model_problems,
    reference_problems,
    router_problems,
)
from megatron_rl.memory import (
    GIB,
    host_bytes_of_offload,
    itemsize,
    keeps_initial_weights,
    reference_arch,
    told_bytes,
)
from megatron_rl.overlap import sampler_bytes, turns_lines
from megatron_rl.parallel.layout import EngineLayout, Layout, PolicyEngines
from megatron_rl.parallel.stages import told_sizes
from megatron_rl.platforms.base import detect
from megatron_rl.policy.refusals import layer_spec_problems
from megatron_rl.preflight import length_problems, read_data
from megatron_rl.rehearsal.report import ranks_that_differ, rehearsal_lines
from megatron_rl.rollout.group_rules import most_kept, most_prompts, most_responses
from megatron_rl.rollout.refusals import engine_problems
from megatron_rl.weights.arch import ModelArch, padded_vocab_size
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model
from megatron_rl.weights.sizes import busiest_rank
from megatron_rl.weights.sync import plan_sync

RANKS_PER_NODE = 8
LAYOUTS_SHOWN = 5
H100_GIB = 79.6
"""Memory of a GPU that is sold as one of 80 GB."""


def print_plan(config: RunConfig, *, gpu_gib: float = H100_GIB) -> None:
    """Print every derived value; gpu_gib: memory of the GPU that a plan is for, where none is here.

    Raises:
        ConfigErrors: the layout does not fit the model or the number of ranks.
    """
    world = _world_size(config)
    model_dir = find_model(config.model.path, "model.path").config_dir
    arch = read_model_config(model_dir, config.model.ignore_config_fields)
    problems = [
        *world_problems(config, world),
        *model_problems(arch, config.parallel),
        *layer_problems(arch, config.model, detect().device_type),
        *layer_spec_problems(config.batching.share_prompts, config.model, detect().device_type),
        *router_problems(arch, config.model),
    ]
    if config.has_vllm:
        problems += engine_problems(arch, config.rollout.tensor_model_parallel_size)
    told = [*map(str, problems), *length_problems(config, arch)]
    if config.reference.path and (reference := reference_arch(config)):
        told += reference_problems(config.reference.path, reference, config.parallel)
    if told:
        raise ConfigErrors(told)
    layout = config.layout_of(world)
    for section, lines in (
        ("layout", _layout(config, arch, layout)),
        ("iteration", _iteration(config, [kind for _, kind, _ in _planned_devices(config, world)])),
        ("passes", _passes(config)),
        *(
            (title, _memory(config, arch, world, gpu_gib, device_type, why))
            for title, device_type, why in _planned_devices(config, world)
        ),
        ("weight sync", _sync(config, arch, layout, world)),
    ):
        _print_section(section, lines)
    turns = list(turns_lines(config, arch, world))
    if turns and any(device == "cuda" for _, device, _ in _planned_devices(config, world)):
        _print_section("training and sampling", turns)


def settled_plan(config: RunConfig, *, gpu_gib: float = H100_GIB) -> RunConfig:
    """The recipe with an engine and a layout where it says auto, which are printed.

    Raises:
        ConfigErrors: no layout fits, or nothing says the number of ranks.
    """
    (_, device_type, _), *_ = _planned_devices(config, _world_size(config))
    config = with_engine(config, device_type, print, is_here=device_type == detect().device_type)
    if not config.parallel.auto:
        return config
    if config.parallel.world_size is None and "WORLD_SIZE" not in os.environ:
        rule = "chooses for a number of ranks, which nothing says"
        way_out = "Set parallel.world_size=8, or as many as you have"
        raise ConfigErrors([str(ConfigError("parallel.auto", True, rule, way_out))])
    world = _world_size(config)
    free = _free_here(world, device_type)
    if free is None and device_type == "cuda":
        free = free_on_planned(gpu_gib)
    chosen = choose_layout(config, world, device_type, free)
    print(*chosen.lines, sep="\n")
    return chosen.applied(config)


def print_rehearsal(config: RunConfig, rank: int | None) -> None:
    """Rehearse a rank of the recipe's layout, or the ranks that hold most, and print what they did.

    Raises:
        InputError: there is no such rank, or torch cannot rehearse here.
        RunError: what is rehearsed fails.
    """
    world = _world_size(config)
    if rank is not None and not 0 <= rank < world:
        raise InputError(f"--rank {rank}: the layout has ranks 0 to {world - 1}")
    model_dir = find_model(config.model.path, "model.path").config_dir
    arch = read_model_config(model_dir, config.model.ignore_config_fields)
    layout = config.layout_of(world)
    ranks = ranks_that_differ(layout, arch.num_layers) if rank is None else [rank]
    for title, lines in rehearsal_lines(config, arch, layout, ranks):
        _print_section(title, lines)


def print_layouts(config: RunConfig, num_gpus: int, *, gpu_gib: float = H100_GIB) -> None:
    """Print layouts of the model on so many GPUs, the one that should be fastest first.

    Raises:
        InputError: none fits.
    """
    model_dir = find_model(config.model.path, "model.path").config_dir
    arch = read_model_config(model_dir, config.model.ignore_config_fields)
    free = free_on_planned(gpu_gib)
    config = with_engine(config, "cuda", print, is_here=detect().device_type == "cuda")
    found = list(itertools.islice(choices(config, arch, num_gpus, free), LAYOUTS_SHOWN))
    if not found:
        raise InputError(
            f"--layouts {num_gpus}: no layout of {model_dir} fits so many GPUs of {gpu_gib:g} GiB. "
            "Take more of them, shorter responses, or optimizer.offload=weights"
        )
    print(f"layouts on {num_gpus} GPUs, by a cost model that no GPU has confirmed")
    for choice in found:
        need = choice.fit.need
        lines = [
            ("seconds of an update, at most", f"{choice.cost.total:.3g}: {choice.cost.told}"),
            (
                "memory, GiB",
                f"update {need.update / GIB:.1f}, rollout {need.generation / GIB:.1f}, "
                f"of {free.per_rank / GIB:.1f}",
            ),
            ("settings", " ".join(f"{name}={typed(v)}" for name, v in choice.settings.items())),
        ]
        _print_section(choice.layout.axes + choice.layout.experts, lines)


def print_inputs(config: RunConfig) -> None:
    """Print what a run of the recipe would read, with its first prompt as text and as tokens.

    Raises:
        ConfigErrors: what a start would refuse in data or tokenizer.
    """
    tokenizer, prompts, benchmarks = read_data(config)
    print("inputs")
    for line in input_lines(config, tokenizer, prompts, benchmarks):
        print(f"  {line}")


def _print_section(title: str, lines: Iterable[tuple[str, str]]) -> None:
    print(title)
    for name, value in lines:
        print(f"  {name:34s} {value}", flush=True)


def _world_size(config: RunConfig) -> int:
    started = os.environ.get("WORLD_SIZE")
    return config.parallel.world_size or (int(started) if started else config.smallest_world)


def _layout(config: RunConfig, arch: ModelArch, layout: Layout) -> Iterator[tuple[str, str]]:
    yield "model", arch.described
    separate = config.rollout.separate_ranks
    yield (
        "ranks",
        f"{layout.world_size} = {layout.axes}"
        + (f", {layout.vpp} chunks a rank" if layout.vpp > 1 else "")
        + (f"; {separate} more only sample" if separate else ""),
    )
    if arch.mixture is not None:
        yield (
            "experts",
            f"{arch.mixture.num_experts} a layer, over EP {layout.ep}; expert TP {layout.etp}",
        )
    sizes = [len(layers) for layers in layout.layers_of(arch.num_layers)]
    told = f"{sizes[0]} of" if len(set(sizes)) == 1 else f"{told_sizes(sizes)}, together"
    yield "layers per chunk", f"{told} {arch.num_layers}"
    yield (
        "vocabulary",
        f"{arch.vocab_size} padded to {padded_vocab_size(arch.vocab_size, layout.tp)}",
    )
    if not config.is_supervised:
        engines = _engines(config, layout)
        told = f"{engines.num_engines} of {engines.told}, {config.engine_dtype}"
        yield "rollout engines", told if config.has_vllm else f"{told}: the policy itself"


def _engines(config: RunConfig, layout: Layout) -> EngineLayout | PolicyEngines:
    if config.engine_tp is None:
        return PolicyEngines(layout)
    separate = config.rollout.separate_ranks
    return EngineLayout(
        world_size=separate or layout.world_size,
        tp=config.rollout.tensor_model_parallel_size,
        first=layout.world_size if separate else 0,
    )


def _iteration(config: RunConfig, kinds: Iterable[str]) -> Iterator[tuple[str, str]]:
    prompts = config.prompts.prompts_per_iteration
    each = config.optimizer.prompts_per_update or prompts
    yield "responses", _responses(config)
    yield "longest sequence", f"{config.longest_sequence} tokens"
    yield "packed row", f"up to {config.row_tokens} tokens; as many rows as kept samples fill"
    shared = " and ".join(filter(config.shares_prompts_on, kinds))
    yield "prompts", f"once for all responses in a row: {shared}" if shared else "once a response"
    yield (
        "optimizer steps",
        f"{config.num_updates} mini-batches of {each} prompts x {config.optimizer.epochs} epochs",
    )
    yield (
        "whole run",
        f"{config.run.num_iterations} iterations, at most {config.most_steps} optimizer steps",
    )


def _responses(config: RunConfig) -> str:
    rounds, wanted = config.rollout.rounds, config.prompts.prompts_per_iteration
    least = 1 if config.is_supervised else config.rollout.group_size
    if rounds is None:
        return f"{wanted} prompts x {least} = {wanted * least}"
    most, prompts = most_responses(config.rollout), most_prompts(rounds, wanted)
    told = f"{wanted} prompts" if prompts == wanted else f"{wanted} to {prompts} prompts"
    each = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"{told} x {each} = {wanted * least} to {prompts * most}; in rounds of up to "
        f"{wanted * least}, of which up to {wanted * most_kept(config.rollout, config.algorithm)} "
        "are trained"
    )


def _passes(config: RunConfig) -> Iterator[tuple[str, str]]:
    from megatron_rl.policy.passes import plan_passes

    algorithm = Algorithm(config.algorithm)
    choice = algorithm.choice
    yield from (("notice", text) for text in config.notices)
    yield "algorithm", config.algorithm.preset
    yield (
        "selection",
        f"{', '.join(choice.selection)}; what is not kept reaches no pass of the update",
    )
    yield "advantage", choice.advantage
    yield "objective", f"{choice.objective}, {choice.loss_aggregation}"
    if (correction := config.algorithm.shared_terms.correction) is not None:
        level, mode, low, high = correction
        yield "rollout correction", f"by {level}, {mode} outside of {low:g} to {high:g}"
    yield from plan_passes(algorithm, **config.steps_of_iteration).reasons
    if config.metrics.kl_every and not config.is_supervised:
        yield (
            "KL measurement",
            f"{config.metrics.kl_rollouts} rollouts every {config.metrics.kl_every} iterations",
        )
    if every := config.metrics.entropy_every:
        yield (
            "entropy measurement",
            f"{config.metrics.kl_rollouts} rollouts every {every} iterations",
        )


def _memory(
    config: RunConfig,
    arch: ModelArch,
    world: int,
    gpu_gib: float,
    device_type: str,
    why: str,
) -> Iterator[tuple[str, str]]:
    """Estimates from sizes; on a GPU, what allocators and libraries add is not in them."""
    yield "device", device_type + why
    free = _free_here(world, device_type)
    if free is None and device_type == "cuda":
        free = free_on_planned(gpu_gib)
    found = fit(config, arch, world, device_type, free)
    need = found.need
    yield from _parts(need.held)
    yield from _parts(need.passing)
    if device_type == "cuda":
        yield from _parts(need.stepping, ", in the optimizer's step only", besides=need.passing)
        yield from _sum("update", need.update, found)
        if need.generating:
            yield from _parts(need.generating, ", while the engine generates")
            stays = sum(need.held.values()) / GIB
            yield "stays of the trainer then", f"{stays:.3f} GiB"
            yield from _sum("rollout", need.generation, found)
    yield from _parts(need.instead, ", in the place of what an update takes")
    if device_type == "cpu":
        yield "sum", f"{need.total / GIB:.3f} GiB at its peak"
    else:
        yield from _host(config, arch, config.layout_of(world))
    if config.rollout.separate_ranks:
        nbytes = sampler_bytes(config, arch, device_type, 0.0 if free is None else free.of_device)
        yield "a rank that only samples", f"{nbytes / GIB:.3f} GiB"
    yield "this machine", _compared(config, arch, found, world, device_type)
    if found.share <= 1:
        yield from (("", line) for line in found.lines())


def _parts(
    parts: Mapping[str, float], where: str = "", *, besides: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    for name, nbytes in parts.items():
        if name not in besides:
            yield name, f"{nbytes / GIB:.3f} GiB{where}"


def _sum(name: str, nbytes: float, found: Fit) -> Iterator[tuple[str, str]]:
    """One of the two sums of a GPU, and how far it is from what there is."""
    assert found.free is not None
    left = found.free.per_rank - nbytes
    told = f"{left / GIB:.1f} GiB are left" if left >= 0 else f"{-left / GIB:.1f} GiB too much"
    yield f"sum of the {name}", f"{nbytes / GIB:.3f} GiB: {told}"


def _host(config: RunConfig, arch: ModelArch, layout: Layout) -> Iterator[tuple[str, str]]:
    """Host memory that ranks on GPUs keep, most of it pinned."""
    kept = {"state that left": host_bytes_of_offload(config, arch, layout, "cuda")}
    kept |= told_bytes(config, arch, layout)
    if keeps_initial_weights(config):
        params = sum(busiest_rank(arch, layout))
        kept["first weights"] = float(params * itemsize(config.model.dtype))
    ranks = min(RANKS_PER_NODE, layout.world_size)
    for name, nbytes in kept.items():
        if nbytes:
            both = f"{nbytes / GIB:.3f} GiB of host memory, {nbytes * ranks / GIB:.1f} GiB"
            yield name, f"{both} of a node of {ranks}"


def _planned_devices(config: RunConfig, world_size: int) -> Iterator[tuple[str, str, str]]:
    """The kinds of device that a recipe is planned for: a title, the kind, and what to say of it.

    A recipe in 16 bits, or with Transformer Engine's layers, may be meant for GPUs where nothing
    else is said: a plan is made on a laptop, too. So it is planned for them as well.
    """
    title, here = "memory per rank", detect().device_type
    if here != "cpu" or os.environ.get("MEGATRON_RL_DEVICE") or "LOCAL_RANK" in os.environ:
        yield title, here, ""
        return
    te = config.model.layer_spec == "transformer_engine"
    dtype = config.model.dtype
    if dtype not in ("bfloat16", "float16") and not te:
        yield title, here, ""
        return
    setting = "layer_spec=transformer_engine" if te else f"dtype={dtype}"
    why = f", of which there is none here: model.{setting} may be meant for it"
    yield title, "cuda", f"{why}. MEGATRON_RL_DEVICE=cpu plans for a CPU alone"
    if not te and world_size <= detect().most_ranks():
        yield "memory per rank on this machine", here, ""


def _free_here(world_size: int, device_type: str) -> Free | None:
    """What is free on this machine, where the run's ranks could all be here."""
    platform = detect()
    if platform.device_type != device_type or world_size > platform.most_ranks():
        return None
    return free_here(platform, world_size, are_started=False)


def _compared(
    config: RunConfig, arch: ModelArch, found: Fit, world_size: int, device_type: str
) -> str:
    """How the run would fare here; never an error, since a plan may be for another machine."""
    if found.free is None:
        if world_size <= detect().most_ranks():
            return "not compared: nothing here says how much memory is free"
        return f"not compared: this machine has no room for {world_size} ranks on a CPU"
    if not found.free.is_here:
        return _on_planned(config, arch, found, world_size)
    if found.share <= 1:
        return f"it fits: {found.free}"
    try:
        refuse_what_cannot_fit(found, config, arch, world_size)
    except ConfigErrors as refused:
        return f"train would refuse it here: {refused.problems[0]}"
    return f"it may not do: {found.free}"


def _on_planned(config: RunConfig, arch: ModelArch, found: Fit, world_size: int) -> str:
    """How the run would fare on a GPU that is not here, and what would make it fit."""
    where = f"not compared, since it has no such GPUs; {found.free}"
    if found.share <= 1:
        return f"{where}, and it fits"
    ways = [f"`{way}`" for way in ways_out(found, config, arch, world_size)]
    return f"{where}, and it does not fit. " + (
        f"It would with {', or '.join(ways)}" if ways else HOPELESS
    )


def _sync(
    config: RunConfig, arch: ModelArch, layout: Layout, world: int
) -> Iterator[tuple[str, str]]:
    if config.is_supervised:
        yield "none", "supervised training has no engine"
        return
    engines = _engines(config, layout)
    if isinstance(engines, PolicyEngines):
        yield "none", "the policy itself samples"
        return
    stats = plan_sync(
        arch,
        layout,
        engines,
        rank=0,
        itemsize=itemsize(config.engine_dtype),
        mib=config.weights.bucket_mib,
        nodes=[rank // RANKS_PER_NODE for rank in range(world)],
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
