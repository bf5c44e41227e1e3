"""Whether a run fits into the memory that is free here, and how it is made to.

A row whose length the recipe leaves open becomes shorter, then the cache of an engine smaller. What
still does not fit is refused before anything is built, with the settings that would make it fit.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch.distributed as dist

from megatron_rl.config import RunConfig, problems, world_problems
from megatron_rl.errors import ConfigErrors
from megatron_rl.megatron.refusals import model_problems, reference_problems
from megatron_rl.memory import (
    GIB,
    Need,
    kv_bytes_of_sequence,
    need_of,
    reference_arch,
    wanted_kv_mib,
)
from megatron_rl.parallel.collectives import max_over
from megatron_rl.platforms.base import Platform
from megatron_rl.platforms.host_memory import own_bytes
from megatron_rl.rollout.kv_cache import LEAST_MIB
from megatron_rl.rollout.refusals import engine_problems
from megatron_rl.weights.arch import ModelArch

MARGIN = 1.25
"""A run is refused where it needs so many times what is free: the estimate may be that far off."""

RESERVED = 2.5 * GIB
"""What CUDA, NCCL and the allocator take of a GPU beside tensors. Not measured by us."""

UNCHECKED = "MEGATRON_RL_UNCHECKED_MEMORY"
"""The variable that starts a run all the same, set to 1."""

MOST_CHANGES, MOST_WAYS = 3, 3  # of a way out, and of them, on a GPU
ROW = "batching.max_tokens_per_microbatch"
RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


@dataclass(frozen=True, kw_only=True)
class Free:
    """Memory of a device that is free, and the ranks that share it."""

    nbytes: float  # for all of these ranks
    ranks: int
    device_type: str
    of_device: float = 0.0  # bytes of a GPU, free or not
    is_here: bool = True  # False: the GPU is one that a plan is made for

    @property
    def per_rank(self) -> float:
        return self.nbytes / self.ranks

    def __str__(self) -> str:
        if not self.is_here:
            return f"a GPU of {_gib(self.of_device)} has {_gib(self.nbytes)} for it"
        if self.device_type == "cuda":
            return f"{_gib(self.nbytes)} of this GPU are free"
        others = "" if self.ranks == 1 else f" for it ({_gib(self.nbytes)} for {self.ranks} ranks)"
        return f"{_gib(self.per_rank)} of this machine's memory are free{others}"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a run was made to fit."""

    need: Need
    free: Free | None  # None: nothing says it
    row_tokens: int
    kv_mib: int | None  # of a CPU engine; None: there is none, or the recipe says it
    wanted_row: int
    wanted_kv_mib: int | None
    former_row: int | None = None  # of the run that this one goes on from

    @property
    def share(self) -> float:
        """What is needed, by what is free."""
        return 0.0 if self.free is None else self.need.total / max(self.free.per_rank, 1.0)

    @property
    def is_too_much_without_a_row(self) -> bool:
        """True where the engine of a GPU needs more than there is: no row is short enough."""
        free = 0.0 if self.free is None else self.free.per_rank
        return self.need.generation > free and self.need.update <= free

    def lines(self) -> Iterator[str]:
        """What a user is told of it."""
        numbers = f"a rank needs some {_gib(self.need.total)} at its peak, and {self.free}"
        if self.row_tokens == self.former_row:
            if self.row_tokens < self.wanted_row:
                yield (
                    f"packed row: up to {self.row_tokens} tokens, as before. "
                    "batching.max_tokens_per_microbatch sets another length"
                )
        elif self.row_tokens < self.wanted_row:
            yield (
                f"packed row: up to {self.row_tokens} tokens in the place of {self.wanted_row}, "
                f"since {numbers}. batching.max_tokens_per_microbatch sets another length"
            )
        if self.kv_mib is not None and self.kv_mib != self.wanted_kv_mib:
            yield (
                f"key/value cache: {self.kv_mib} MiB in the place of {self.wanted_kv_mib}, since "
                f"{numbers}. rollout.kv_cache_mib sets another size"
            )
        if self.share > 1:
            yield f"memory: it may not do: {numbers}"

    def applied(self, config: RunConfig) -> RunConfig:
        """The recipe with the row that fits, which checkpoints and config.yaml then keep."""
        if self.row_tokens == self.wanted_row:
            return config
        return changed_in(config, "batching", max_tokens_per_microbatch=self.row_tokens)

    def agreed(self) -> "Fit":
        """The least of all ranks, which build the same; every rank calls it."""
        row = least_of_all(self.row_tokens)
        assert row is not None
        return replace(self, row_tokens=row, kv_mib=least_of_all(self.kv_mib))


def least_of_all(value: int | None) -> int | None:
    """The least value of any rank; None where no rank has one. Every rank calls it."""
    world = dist.group.WORLD
    assert world is not None
    (least,) = max_over([-inf if value is None else -value], world)
    return None if least == -inf else int(-least)


def free_here(platform: Platform, ranks: int, *, are_started: bool) -> Free | None:
    """What is free on this machine for one of so many ranks of it; None: nothing says it."""
    nbytes = platform.free_memory_bytes()
    if nbytes is None:
        return None
    if platform.device_type == "cuda":
        total = float(platform.total_memory_bytes())
        return Free(nbytes=nbytes, ranks=1, device_type="cuda", of_device=total)
    # A rank that asks has taken some already, and so have the others.
    taken = own_bytes() * ranks if are_started else 0
    return Free(nbytes=nbytes + taken, ranks=ranks, device_type=platform.device_type)


def free_on_planned(gib: float) -> Free:
    """What a run has of a GPU of so many GiB that is not here."""
    of_device = gib * GIB
    return Free(
        nbytes=max(of_device - RESERVED, 0.0),
        ranks=1,
        device_type="cuda",
        of_device=of_device,
        is_here=False,
    )


def fit(
    config: RunConfig,
    arch: ModelArch,
    world_size: int,
    device_type: str,
    free: Free | None,
    *,
    former_row: int | None = None,
) -> Fit:
    """The longest row, and then the largest cache, with which a run fits; else the least ones.

    former_row: of the run that this one goes on from. It is kept where it fits, since other rows
    round otherwise.
    """
    layout = config.layout_of(world_size)
    rows = list(_rows(config, former_row))
    caches: list[int | None] = [None]
    if device_type == "cpu" and config.has_engine_beside:
        caches = list(_caches(config, arch, wanted_kv_mib(config, arch, layout)))
    found = None
    for kv_mib in caches:
        for row in rows:
            need = need_of(
                config,
                arch,
                layout,
                device_type,
                row_tokens=row,
                kv_mib=kv_mib,
                device_bytes=0.0 if free is None else free.of_device,
            )
            found = Fit(
                need=need,
                free=free,
                row_tokens=row,
                kv_mib=kv_mib,
                wanted_row=config.row_tokens,
                wanted_kv_mib=caches[0],
                former_row=former_row,
            )
            if found.share <= 1 or found.is_too_much_without_a_row:
                return found
    assert found is not None
    return found


def kv_mib_alone(
    config: RunConfig, arch: ModelArch, world_size: int, free: Free | None
) -> int | None:
    """The largest cache, in MiB, of an engine on a CPU beside which nothing is trained.

    None: on a GPU, or where nothing says what is free.
    """
    if free is None or free.device_type != "cpu":
        return None
    layout = config.layout_of(world_size)
    caches = list(_caches(config, arch, wanted_kv_mib(config, arch, layout)))
    engine = need_of(config, arch, layout, "cpu", kv_mib=0).engine_alone
    return next((mib for mib in caches if engine + mib * 2**20 <= free.per_rank), caches[-1])


def refuse_engine_that_cannot_fit(
    config: RunConfig, arch: ModelArch, world: int, free: Free | None, *, is_alone: bool
) -> None:
    """Raise ConfigErrors where an evaluation needs far more than is free.

    is_alone: the engine reads the weights itself; else they come through a policy beside it.
    """
    if free is None or os.environ.get(UNCHECKED) == "1":
        return
    least = _least_of_engine(config, arch, world, free, is_alone=is_alone)
    if least <= MARGIN * free.per_rank:
        return
    fewer = range(world - 1, 0, -1) if free.device_type == "cpu" and free.ranks == world else ()
    ways = []
    for ranks in fewer:
        fewer_share = replace(free, ranks=ranks)
        fits = not any(world_problems(config, ranks)) and (
            _least_of_engine(config, arch, ranks, fewer_share, is_alone=is_alone)
            <= fewer_share.per_rank
        )
        if fits:
            ways = [f"It would fit with `torchrun --nproc-per-node {ranks}`"]
            break
    way_out = ways[0] if ways else "Take more memory or a smaller model"
    if not ways and config.rollout.kv_cache_mib is not None:
        way_out += ", or leave rollout.kv_cache_mib out, which sizes the cache by what is free"
    raise ConfigErrors(
        [
            f"memory: a rank of the evaluation needs some {_gib(least)} for the engine's weights "
            f"and the longest sequence{'' if is_alone else ', and the policy beside it'}, and "
            f"{free}. {way_out}. {UNCHECKED}=1 starts it all the same"
        ]
    )


def _least_of_engine(
    config: RunConfig, arch: ModelArch, world: int, free: Free, *, is_alone: bool
) -> float:
    """Bytes that a rank needs to evaluate, with the smallest cache."""
    layout = config.layout_of(world)
    if free.device_type == "cpu":
        kv_mib = list(_caches(config, arch, wanted_kv_mib(config, arch, layout)))[-1]
        need = need_of(config, arch, layout, "cpu", kv_mib=kv_mib)
        beside = 0.0 if is_alone else need.held["weights"] + need.held["gradients"]
        return need.engine_alone + beside
    need = need_of(config, arch, layout, free.device_type)
    beside = 0.0 if is_alone else sum(need.held.values())
    return sum(need.generating.values()) + beside


def refuse_what_cannot_fit(found: Fit, config: RunConfig, arch: ModelArch, world: int) -> None:
    """Raise ConfigErrors where a run needs far more than is free."""
    if found.share <= MARGIN or os.environ.get(UNCHECKED) == "1":
        return
    ways = [f"`{way}`" for way in ways_out(found, config, arch, world)]
    raise ConfigErrors(
        [
            f"memory: a rank needs some {_gib(found.need.total)} at its peak "
            f"({found.need.largest}), and {found.free}. "
            + (f"It would fit with {', or '.join(ways)}" if ways else HOPELESS)
            + f". {UNCHECKED}=1 starts it all the same"
        ]
    )


HOPELESS = (
    "No row is short enough: take more memory, a smaller model, or more ranks on other machines "
    "that share it (parallel.tensor_model_parallel_size, pipeline_model_parallel_size)"
)


def ways_out(found: Fit, config: RunConfig, arch: ModelArch, world: int) -> Iterator[str]:
    """Overrides, and a number of ranks, with which the run fits here."""
    assert found.free is not None
    if found.free.device_type == "cuda":
        yield from _ways_on_a_gpu(found.free, config, arch, world)
        return

    def fits(changed: RunConfig, ranks: int = world, free: Free = found.free) -> bool:
        is_valid = not any(problems(changed)) and not any(world_problems(changed, ranks))
        return is_valid and fit(changed, arch, ranks, free.device_type, free).share <= 1

    open_row = changed_in(config, "batching", max_tokens_per_microbatch=None)
    anew = changed_in(config, "model", **RECOMPUTED)
    overrides = " ".join(f"model.{name}={value}" for name, value in RECOMPUTED.items())
    if fits(open_row) and config.batching.max_tokens_per_microbatch is not None:
        row = fit(open_row, arch, world, found.free.device_type, found.free).row_tokens
        yield f"batching.max_tokens_per_microbatch={row}"
    if fits(anew):
        yield overrides
    elif fits(both := changed_in(open_row, "model", **RECOMPUTED)):
        row = fit(both, arch, world, found.free.device_type, found.free).row_tokens
        yield f"{overrides} batching.max_tokens_per_microbatch={row}"
    if found.free.device_type == "cpu" and found.free.ranks == world:
        for ranks in range(world - 1, 0, -1):
            if fits(config, ranks, replace(found.free, ranks=ranks)):
                yield f"torchrun --nproc-per-node {ranks}"
                return


def _ways_on_a_gpu(free: Free, config: RunConfig, arch: ModelArch, world: int) -> Iterator[str]:
    """Overrides with which the run fits: single changes where one does, else two or three."""
    changes = list(_changes(config, arch, world))
    for count in range(1, MOST_CHANGES + 1):
        ways = []
        for chosen in itertools.combinations(changes, count):
            settings = dict(itertools.chain.from_iterable(change.items() for change in chosen))
            if len(settings) < sum(map(len, chosen)):  # two of them set the same
                continue
            changed = config
            for name, value in settings.items():
                section, _, field = name.partition(".")
                changed = changed_in(changed, section, **{field: value})
            if not is_possible(changed, arch, world):
                continue
            fitted = fit(changed, arch, world, "cuda", free)
            if fitted.share <= 1:
                settings |= {name: fitted.row_tokens for name in settings if name == ROW}
                ways.append(" ".join(f"{name}={typed(value)}" for name, value in settings.items()))
            if len(ways) == MOST_WAYS:
                break
        yield from ways
        if ways:
            return


def _changes(config: RunConfig, arch: ModelArch, world: int) -> Iterator[dict[str, Any]]:
    """What may make a run smaller on a GPU, the cheapest first; each is one change."""
    if config.batching.max_tokens_per_microbatch is not None:
        yield {ROW: None}
    order = ("none", "optimizer", "weights")
    for offload in order[order.index(config.offload_on("cuda")) + 1 :]:
        if config.has_engine_beside:
            yield {"optimizer.offload": offload}
    if config.model.recompute_granularity != "full":
        yield {f"model.{name}": value for name, value in RECOMPUTED.items()}
    if config.has_engine_beside:
        yield from (
            {"rollout.gpu_memory_utilization": share}
            for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
            if share != config.rollout.gpu_memory_utilization
        )
        yield from (
            {"rollout.tensor_model_parallel_size": ranks}
            for ranks in (2, 4, 8)
            if config.rollout.tensor_model_parallel_size < ranks
        )
    yield from _layouts(config, arch, world)


def _layouts(config: RunConfig, arch: ModelArch, world: int) -> Iterator[dict[str, Any]]:
    """Ways to cut the model further."""
    parallel = config.parallel
    for tp in (2, 4, 8):
        if parallel.tensor_model_parallel_size < tp:
            yield {
                "parallel.tensor_model_parallel_size": tp,
                "parallel.sequence_parallel": True,
            }
    for pp in (2, 4, 8):
        if parallel.pipeline_model_parallel_size < pp <= world:
            yield {"parallel.pipeline_model_parallel_size": pp}
    if arch.mixture is not None:
        for ep in (2, 4, 8):
            if parallel.expert_model_parallel_size < ep:
                yield {
                    "parallel.expert_model_parallel_size": ep,
                    "parallel.expert_tensor_parallel_size": 1,
                }


def is_possible(config: RunConfig, arch: ModelArch, world: int) -> bool:
    """True where nothing refuses the recipe for this model and number of ranks."""
    found: list[Iterator[Any]] = [
        problems(config),
        world_problems(config, world),
        model_problems(arch, config.parallel),
    ]
    if config.has_vllm:
        found.append(engine_problems(arch, config.rollout.tensor_model_parallel_size))
    if config.reference.path and (reference := reference_arch(config)):
        found.append(reference_problems(config.reference.path, reference, config.parallel))
    return next(itertools.chain.from_iterable(found), None) is None


def typed(value: Any) -> str:
    """A value as an override has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rows(config: RunConfig, former: int | None) -> Iterator[int]:
    """Lengths to try, from that of the recipe on; one alone where the recipe says it."""
    row = config.row_tokens
    if config.batching.max_tokens_per_microbatch is not None:
        yield row
        return
    row = max(config.longest_unit, min(row, former or row))
    while row > config.longest_unit:
        yield row
        row = row // 2
    yield config.longest_unit


def _caches(config: RunConfig, arch: ModelArch, wanted: int) -> Iterator[int]:
    """Sizes to try in MiB, of which each holds the longest sequence."""
    yield wanted
    if config.rollout.kv_cache_mib is not None:
        return
    least = max(LEAST_MIB, -(-kv_bytes_of_sequence(config, arch) // 2**20))
    while wanted > least:
        wanted = max(least, wanted // 2)
        yield wanted


def changed_in(config: RunConfig, section: str, **values: Any) -> RunConfig:
    """The recipe with other values of one section, which are not checked."""
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"
