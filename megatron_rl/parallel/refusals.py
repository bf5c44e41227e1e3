"""Sizes that do not cut a model, each refused with the nearest ones that do."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd, lcm

from megatron_rl.errors import ConfigError
from megatron_rl.parallel.config import CHOSEN, MAX_RANKS, ParallelConfig
from megatron_rl.parallel.stages import EVEN, Split, splits_that_work, stage_sizes, told_sizes

FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
EMBEDDING, LOSS = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"


def rank_problems(
    parallel: ParallelConfig, world_size: int, separate_ranks: int = 0
) -> Iterator[ConfigError]:
    """Why the training layout does not fit this number of ranks.

    separate_ranks: of them, which only sample.
    """
    one = parallel.layout(1)
    replica = one.tp * one.cp * one.pp
    if parallel.world_size not in (None, world_size):
        yield ConfigError(
            "parallel.world_size",
            parallel.world_size,
            f"{world_size} ranks were started",
            f"Start torchrun with --nproc-per-node times --nnodes = {parallel.world_size}",
        )
    world_size -= separate_ranks
    of_run = "that train" if separate_ranks else "of this run"
    if world_size % replica:
        sizes = "tensor_model_parallel_size * pipeline_model_parallel_size"
        yield ConfigError(
            f"parallel.{sizes}" + (" * context_parallel_size" if one.cp > 1 else ""),
            replica,
            f"must divide the {world_size} ranks {of_run}",
            f"Start a multiple of {replica} ranks"
            + (f" and {separate_ranks} more" if separate_ranks else "")
            + ", or change the layout",
        )
    if one.ep > 1 and world_size % (one.etp * one.ep * one.pp):
        yield ConfigError(
            "parallel.expert_model_parallel_size * expert_tensor_parallel_size",
            one.ep * one.etp,
            f"must divide the {world_size // one.pp} ranks of a pipeline stage",
            f"Start a multiple of {one.pp * lcm(one.tp * one.cp, one.etp * one.ep)} ranks, or "
            "another layout",
        )


def auto_problems(parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Sizes beside the setting that chooses them."""
    for name in CHOSEN:
        value = getattr(parallel, name)
        if value != ParallelConfig.model_fields[name].default:
            yield ConfigError(
                f"parallel.{name}",
                value,
                "stands beside parallel.auto, which chooses it",
                "Leave it out, or set parallel.auto=false",
            )


def split_problems(
    field: str, tp: int, rows: Sequence[tuple[str, int]], num_key_heads: int | None = None
) -> Iterator[ConfigError]:
    """Why so many ranks cannot share the matrices of a layer.

    Args:
        field: the setting that says `tp`.
        tp: the number of ranks.
        rows: (name, number) of everything that is cut evenly.
        num_key_heads: of keys and values, each of which may also stand on several ranks.
    """
    keys = num_key_heads
    works = [
        size
        for size in divisors(gcd(*(count for _, count in rows)))
        if keys is None or keys % size == 0 or size % keys == 0
    ]
    for what, count in rows:
        if count % tp:
            rule = f"must divide the model's {count} {what}"
            yield ConfigError(field, tp, rule, f"Choose {nearest(tp, works)}")
    if keys is not None and keys % tp and tp % keys:
        rule = f"must divide the model's {keys} key/value heads or be a multiple of them"
        yield ConfigError(field, tp, rule, f"Choose {nearest(tp, works)}")


def uneven_problems(parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Problems of settings of uneven stages, whatever the model."""
    split, pp = parallel.split, parallel.pipeline_model_parallel_size
    chosen = [name for name in (FIRST, LAST, EMBEDDING, LOSS) if getattr(parallel, name)]
    if pp == 1:
        for name in chosen:
            yield ConfigError(
                f"parallel.{name}",
                getattr(parallel, name),
                "has no effect at pipeline_model_parallel_size=1",
                "Leave it out",
            )
    elif split.has_sizes and split.counts_ends:
        yield ConfigError(
            f"parallel.{chosen[-1]}",
            True,
            f"Megatron-Core does not take it beside {chosen[0]}",
            "Leave one of them out",
        )


def stage_problems(num_layers: int, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Why the pipeline cannot share so many layers."""
    pp, split = parallel.pipeline_model_parallel_size, parallel.split
    vpp = parallel.virtual_pipeline_model_parallel_size or 1
    if any(uneven_problems(parallel)) or stage_sizes(num_layers, pp, vpp, split) is not None:
        return
    each = ", and every rank's over its chunks" if vpp > 1 else ""
    if split.has_sizes:
        name = LAST if split.last is not None else FIRST
        own = [size for size in (split.first, split.last) if size is not None]
        rest, between = num_layers - sum(own), pp - len(own)
        rule = f"both ranks together must have the model's {num_layers} layers{each}"
        if between:
            others = f"{between} {'rank' if between == 1 else 'ranks'} with one at least{each}"
            left = f"{max(rest, 0)} of the model's {num_layers} layers are left"
            rule = f"{left}, which must divide over {others}"
    elif split.counts_ends:
        name = LOSS if split.counts_loss else EMBEDDING
        more = split.counts_embedding + split.counts_loss
        rule = f"the model's {num_layers} layers and {more} more must divide over {pp} ranks{each}"
    else:
        name = "pipeline_model_parallel_size"
        rule = f"must divide the model's {num_layers} layers" + (
            f" (with {vpp} chunks a rank: {pp * vpp})" if vpp > 1 else ""
        )
    value = getattr(parallel, name)
    yield ConfigError(f"parallel.{name}", value, rule, _ways_out(num_layers, pp, vpp, split))


def _ways_out(num_layers: int, pp: int, vpp: int, now: Split) -> str:
    """Settings of uneven stages that cut the model, as they are typed, and other sizes."""
    ways = []
    for split in splits_that_work(num_layers, pp, vpp):
        sizes = stage_sizes(num_layers, pp, vpp, split)
        assert sizes is not None
        ways.append(f"set {_overrides(split, now)} for stages of {told_sizes(sizes)} layers")
    if now.has_sizes:
        value = now.first if now.last is None else now.last
        works = [
            size
            for size in range(1, min(num_layers, MAX_RANKS) + 1)
            if stage_sizes(num_layers, pp, vpp, _with_size(now, size)) is not None
        ]
    else:
        value = pp
        works = [
            size
            for size in divisors(num_layers)
            if (size > 1 or vpp == 1) and stage_sizes(num_layers, size, vpp, EVEN) is not None
        ]
    if works and value is not None and not now.counts_ends:
        ways.append(f"choose {nearest(value, works)}")
    if not ways:
        return "Choose fewer ranks" + (" or chunks" if vpp > 1 else "")
    text = ", or ".join(ways)
    return text[0].upper() + text[1:]


def _with_size(split: Split, size: int) -> Split:
    """The split with another size of the last end that has one."""
    return replace(split, first=size) if split.last is None else replace(split, last=size)


def _overrides(split: Split, now: Split) -> str:
    """What is typed to get one split in the place of another."""
    values = {
        FIRST: (split.first, now.first),
        LAST: (split.last, now.last),
        EMBEDDING: (split.counts_embedding, now.counts_embedding),
        LOSS: (split.counts_loss, now.counts_loss),
    }
    return " ".join(
        f"parallel.{name}={'null' if new is None else str(new).lower()}"
        for name, (new, old) in values.items()
        if new != old
    )


def divisors(count: int) -> list[int]:
    """The numbers of ranks that divide a number, from the smallest on."""
    return [size for size in range(1, min(count, MAX_RANKS) + 1) if count % size == 0]


def nearest(size: int, works: Sequence[int]) -> str:
    """Up to two sizes below and two above one, as they are told: "1, 2, 7 or 14" for 4 of 14.

    Args:
        size: that does not work.
        works: sizes that do, from the smallest on.
    """
    near = [one for one in works if one < size][-2:] + [one for one in works if one > size][:2]
    *others, last = map(str, near)
    return f"{', '.join(others)} or {last}" if others else last
