"""What `plan --rehearse` says of the ranks that it has rehearsed."""

from collections.abc import Iterator, Sequence

from megatron_rl.config import RunConfig
from megatron_rl.memory import GIB, need_of
from megatron_rl.parallel.layout import Layout
from megatron_rl.rehearsal.apart import rehearse_apart
from megatron_rl.rehearsal.rank import Rehearsal
from megatron_rl.weights.arch import ModelArch


def ranks_that_differ(layout: Layout, num_layers: int) -> list[int]:
    """A rank of the first pipeline stage, and one of the last: these two hold most.

    Where stages are uneven, one with the most layers is among them too.
    """
    stages = layout.layers_of(num_layers)
    layers = [sum(map(len, stages[pp_rank :: layout.pp])) for pp_rank in range(layout.pp)]
    of_stage = layout.world_size // layout.pp
    return [pp_rank * of_stage for pp_rank in sorted({0, layers.index(max(layers)), layout.pp - 1})]


def rehearsal_lines(
    config: RunConfig, arch: ModelArch, layout: Layout, ranks: Sequence[int]
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, [(name, value)]) of each rank, as soon as it was rehearsed."""
    need = need_of(config, arch, layout, "cuda")
    for rank in ranks:
        found = rehearse_apart(config, layout.world_size, rank)
        title = f"rehearsal of rank {rank} of {layout.world_size}"
        yield title, list(_lines(found, need.update))


def _lines(found: Rehearsal, planned: float) -> Iterator[tuple[str, str]]:
    of_recipe = f" of {found.rows_of_recipe}" if found.rows < found.rows_of_recipe else ""
    yield "rows of the update", f"{found.rows}{of_recipe}, of {found.row_tokens} tokens"
    for name, nbytes in found.held.items():
        yield name, f"{nbytes / GIB:.3f} GiB"
    for phase, nbytes in found.memory.items():
        yield f"most held, {phase}", f"{nbytes / GIB:.3f} GiB"
    peak = max(found.memory.values())
    yield "planned for the update", f"{planned / GIB:.3f} GiB, {planned / peak:.2f} of what it is"
    yield "stays while the engine generates", f"{found.stays / GIB:.3f} GiB"
    for phase, kinds in found.collectives.items():
        for kind, (calls, nbytes) in kinds.items():
            yield f"{phase}, {kind}", f"{calls} times, {nbytes / 2**20:.3f} MiB"
    if not found.waits:
        yield "host waits for the device", "never in a forward or backward pass"
    for place, times in found.waits.items():
        yield "host waits for the device", f"{times} times in {place}"
    yield "took", f"{found.seconds:.0f} s"
