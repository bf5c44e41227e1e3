"""Which layout a model should have on so many GPUs: of those that fit, the fastest by a cost model.

What fits is decided by the sums of `plan`. The cost model counts the operations of an update and
the bytes that its ranks exchange, and divides them by what an H100 node is sold with; it knows of
no overlap. It orders layouts and predicts no seconds: nothing of it has been measured on a GPU.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron_rl.config import RunConfig
from megatron_rl.fit import RECOMPUTED, Fit, Free, changed_in, fit, is_possible
from megatron_rl.memory import itemsize, longest_row, rows_of_update
from megatron_rl.parallel.layout import Layout
from megatron_rl.parallel.stages import splits_that_work
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.sizes import busiest_rank

SIZES = (1, 2, 4, 8)
ENGINE = (*SIZES, 16, 32)
"""Ranks of an engine; the largest ones lie on several nodes, where no smaller one holds a model."""

MOST_STAGES = 16
EXPERT_RANKS = (1, 2, 4, 8, 16, 32, 64)
LONG = 16384
"""Tokens of a sequence from which on ranks that share it are considered."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What ranks compute and exchange in a second."""

    operations: float = 989e12 * 0.4  # dense 16-bit operations of an H100, and the share reached
    inside: float = 450e9 * 0.7  # bytes to a GPU of the same node
    between: float = 50e9 * 0.7  # bytes to a GPU of another node
    memory: float = 3.35e12 * 0.6  # bytes that it reads of its own memory
    node: int = 8  # GPUs


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of an update by the model, by what takes them."""

    computing: float
    pipeline: float  # stages that wait at both ends of an update
    tensor: float
    context: float
    experts: float
    replicas: float  # gradients and weights of the distributed optimizer

    @property
    def total(self) -> float:
        return sum((getattr(self, part.name) for part in fields(self)), 0.0)

    @property
    def told(self) -> str:
        """The parts that are not nothing, the largest first."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        names = sorted((name for name in parts if parts[name]), key=lambda name: -parts[name])
        return ", ".join(f"{name} {parts[name]:.2g}" for name in names)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A layout, as the settings that make it."""

    settings: dict[str, Any]  # those that differ from their defaults or from the recipe
    config: RunConfig  # the recipe with them
    layout: Layout
    cost: Cost
    fit: Fit


def choices(
    config: RunConfig,
    arch: ModelArch,
    world: int,
    free: Free | None,
    *,
    machine: Machine | None = None,
    device_type: str = "cuda",
    engines: Sequence[int] = ENGINE,
) -> Iterator[Choice]:
    """Layouts of so many ranks that fit, the cheapest by the cost model first.

    A layout comes once, with layers computed anew only where it does not fit without. An engine's
    cut is the smallest that fits, since fewer ranks to wait for generate more.
    """
    seen = set()
    for cost, changed in _costed(config, arch, world, machine or Machine()):
        layout = changed.layout_of(world)
        found = None
        if layout not in seen:
            fits = _fits_by_engine(changed, arch, world, free, device_type, engines)
            found = next((pair for pair in fits if pair[1].share <= 1), None)
        if found is not None:
            seen.add(layout)
            yield _choice(config, *found, cost, layout)


def nearest_choice(
    config: RunConfig,
    arch: ModelArch,
    world: int,
    free: Free | None,
    device_type: str,
    engines: Sequence[int],
) -> Choice | None:
    """Of the layouts of which none fits, the one that needs the least; None: none is possible."""
    nearest: Choice | None = None
    for cost, changed in _costed(config, arch, world, Machine()):
        for one, fitted in _fits_by_engine(changed, arch, world, free, device_type, engines):
            if nearest is None or fitted.share < nearest.fit.share:
                nearest = _choice(config, one, fitted, cost, changed.layout_of(world))
    return nearest


def _choice(
    recipe: RunConfig, config: RunConfig, fitted: Fit, cost: Cost, layout: Layout
) -> Choice:
    settings = _settings(config, recipe)
    return Choice(settings=settings, config=config, layout=layout, cost=cost, fit=fitted)


def _costed(
    config: RunConfig, arch: ModelArch, world: int, machine: Machine
) -> list[tuple[Cost, RunConfig]]:
    """Every possible layout, with and without layers computed anew, the cheapest first."""
    costed = []
    for parallel, computed in itertools.product(
        _layouts(config, arch, world), ({}, RECOMPUTED) if _keeps_all(config) else ({},)
    ):
        changed = changed_in(changed_in(config, "parallel", **parallel), "model", **computed)
        if is_possible(changed_in(changed, "rollout", tensor_model_parallel_size=1), arch, world):
            costed.append((cost_of(changed, arch, world, machine), changed))
    return sorted(costed, key=lambda one: one[0].total)


def _keeps_all(config: RunConfig) -> bool:
    return config.model.recompute_granularity != "full"


def cost_of(config: RunConfig, arch: ModelArch, world: int, machine: Machine) -> Cost:
    """Seconds of an update of the longest sequences."""
    layout, nbytes = config.layout_of(world), itemsize(config.model.dtype)
    row = longest_row(config, layout)
    rows = rows_of_update(config, layout, row)
    tokens = row * rows  # of a replica
    layers, is_anew = arch.num_layers, config.model.recompute_granularity == "full"
    most = max(map(len, layout.layers_of(layers)))  # of a stage, for which the others wait
    attended = 2 * 2 * arch.query_rows * arch.keys_seen(config.longest_sequence)
    if arch.delta is not None:  # a token reads and changes the states of its nets
        nets = layers - arch.num_attention_layers
        attended += 2 * 4 * arch.delta.value_rows * arch.delta.key_dim * nets
    operations = (2 * active_parameters(arch) + attended) * (4 if is_anew else 3) * tokens
    computing = operations * most / layers / (layout.tp * layout.cp) / machine.operations

    here = most * tokens / layout.cp  # tokens times layers of a rank
    hidden = arch.hidden_size * nbytes

    def seconds(sent: float, ranks: int, span: int) -> float:
        """sent: bytes of all of them; span: the ranks from the first to the last of the group."""
        speed = machine.inside if span <= machine.node else machine.between
        return sent * (ranks - 1) / ranks / speed

    # An all-gather and a reduce-scatter around attention and around the feed-forward network; the
    # backward gathers their inputs once more.
    around = 10 + (4 if is_anew else 0)
    tensor = seconds(around * here * hidden, layout.tp, layout.tp)
    keys = 2 * arch.key_rows / layout.tp * nbytes
    # Gathered forward and backward, and reduced once.
    context = seconds(3 * here * layout.cp * keys, layout.cp, layout.tp * layout.cp)
    experts = 0.0
    if arch.mixture is not None:
        sent = 4 * arch.mixture.top_k * hidden * here / layout.tp  # there and back, twice
        experts = seconds(sent, layout.ep, layout.etp * layout.ep)
    shared, of_experts = busiest_rank(arch, layout)
    exchanged = 4 + nbytes  # gradients in float32, weights in their own dtype
    replicas = seconds(exchanged * shared, layout.copies, layout.tp * layout.copies)
    if of_experts:
        span = layout.etp * layout.ep * layout.expert_dp
        replicas += seconds(exchanged * of_experts, layout.expert_dp, span)
    busy = computing + tensor + context + experts
    return Cost(
        computing=computing,
        pipeline=busy * (layout.pp - 1) / (rows * layout.vpp),
        tensor=tensor,
        context=context,
        experts=experts,
        replicas=replicas,
    )


def active_parameters(arch: ModelArch) -> int:
    """Parameters that a token meets: all but those of experts that it is not sent to."""
    if arch.mixture is None:
        return arch.num_parameters
    layers = sum(map(arch.has_experts, range(arch.num_layers)))
    idle = arch.mixture.num_experts - arch.mixture.top_k
    return arch.num_parameters - layers * idle * 3 * arch.hidden_size * arch.mixture.ffn_hidden_size


def _layouts(config: RunConfig, arch: ModelArch, world: int) -> Iterator[dict[str, Any]]:
    """Sizes that may be worth a look, as settings of `parallel`."""
    contexts = SIZES if config.longest_sequence >= LONG else (1,)
    experts = EXPERT_RANKS if arch.mixture is not None else (1,)
    stages = range(1, MOST_STAGES + 1)
    for tp, cp, pp, ep in itertools.product(SIZES, contexts, stages, experts):
        if world % (tp * cp * pp) or pp * ep > world:
            continue
        for split in splits_that_work(arch.num_layers, pp, 1):
            yield {
                "auto": False,
                "tensor_model_parallel_size": tp,
                "context_parallel_size": cp,
                "pipeline_model_parallel_size": pp,
                "virtual_pipeline_model_parallel_size": None,
                "num_layers_in_first_pipeline_stage": split.first,
                "num_layers_in_last_pipeline_stage": split.last,
                "account_for_embedding_in_pipeline_split": split.counts_embedding,
                "account_for_loss_in_pipeline_split": split.counts_loss,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": 1 if ep > 1 else None,
                "sequence_parallel": tp > 1,
                "world_size": world,
            }


def _fits_by_engine(
    config: RunConfig,
    arch: ModelArch,
    world: int,
    free: Free | None,
    device_type: str,
    engines: Sequence[int],
) -> Iterator[tuple[RunConfig, Fit]]:
    """The recipe with each cut of an engine, from the smallest on, as far as one may help."""
    for engine in engines if config.has_engine else engines[:1]:
        changed = changed_in(config, "rollout", tensor_model_parallel_size=engine)
        if not is_possible(changed, arch, world):
            continue
        fitted = fit(changed, arch, world, device_type, free)
        yield changed, fitted
        if free is not None and device_type == "cuda" and fitted.need.update > free.per_rank:
            return  # whatever the engine is


def _settings(changed: RunConfig, recipe: RunConfig) -> dict[str, Any]:
    """What has to be written into the recipe, as typed: every size that is not the default."""
    settings = {}
    for section in ("parallel", "model", "rollout"):
        now, before = getattr(changed, section), getattr(recipe, section)
        for name, field in type(now).model_fields.items():
            value = getattr(now, name)
            if value != getattr(before, name) or (
                section == "parallel" and name != "watchdog" and value != field.default
            ):
                settings[f"{section}.{name}"] = value
    return settings
