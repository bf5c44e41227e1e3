"""The policy as a Hugging Face directory: one more reshard, from training ranks to files."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.parallel.collectives import all_or_none, nothing
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.critic_files import (
    critic_holders,
    without_lm_head,
    write_value_head,
)
from megatron_rl.weights.disk import put_in_place, sync_tree
from megatron_rl.weights.expert_stacks import Places, Stack, in_files
from megatron_rl.weights.hf_files import (
    HfCheckpoint,
    copy_companions,
    file_name,
    plan_files,
    write_index,
)
from megatron_rl.weights.layouts import float32_names, hf_pieces, hf_shapes, stacks
from megatron_rl.weights.pieces import whole
from megatron_rl.weights.plan import Holders, Plan, build_plan
from megatron_rl.weights.room import ROOM_FOR_THE_REST, Room
from megatron_rl.weights.sync import training_holders
from megatron_rl.weights.tensor_file import TensorFileWriter
from megatron_rl.weights.transfer import execute

BATCH_BYTES = 256 << 20
"""Most bytes of tensors that a rank has in memory at a time, unless one tensor is larger."""

Shapes = dict[str, tuple[int, ...]]


def export_hf(
    params: Mapping[str, Tensor],
    arch: ModelArch,
    groups: Groups,
    *,
    source: Path,
    output: Path,
    dtype: torch.dtype,
    file_mib: int,
    value_head: Tensor | None = None,
    is_critic: bool = False,
) -> None:
    """Write a Hugging Face directory with these weights and the config and tokenizer of `source`.

    Every rank calls it. A critic's directory has no LM head and, in a file of its own, value_head
    [1, H], which the ranks of the last pipeline stage bring along.

    Files are dealt out to the ranks, which gather and write a few tensors at a time. `output`
    appears under its name only when it is complete. An error on one rank is raised on all.

    Raises:
        RunError: the disk is full.
    """
    sources, shapes = training_holders(arch, groups.layout), hf_shapes(arch)
    if is_critic:
        sources, shapes = critic_holders(sources), without_lm_head(shapes)
    exact = float32_names(arch)
    tensors = in_files(shapes, stacks(arch))
    dtypes = {name: torch.float32 if name in exact else dtype for name in tensors}
    nbytes = {name: prod(stack.shape) * dtypes[name].itemsize for name, stack in tensors.items()}
    by_dtype = _files_by_dtype(nbytes, dtypes, file_mib << 20)
    files = list(chain.from_iterable(by_dtype.values()))
    temporary = output.with_name(f".{output.name}.partial")
    room = Room("the export", output.parent, needed=sum(nbytes.values()) + ROOM_FOR_THE_REST)

    def on_the_disk(work: Callable[[], None], *, has_part: bool = True) -> None:
        all_or_none(partial(room.naming_full_disk, work) if has_part else nothing, groups.world)

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_index(temporary, files, sum(nbytes.values()))
        copy_companions(source, temporary, dtype)

    def write_head() -> None:
        assert value_head is not None
        write_value_head(temporary, value_head)

    def finish() -> None:
        # Index, headers and table must agree.
        HfCheckpoint(temporary, shapes, stacks=stacks(arch))
        sync_tree(temporary)
        put_in_place(temporary, output)

    on_the_disk(prepare, has_part=groups.is_main)
    writes_head = groups.is_first_copy and groups.here.dp_rank == 0
    writer = _FileSequence(temporary, files, tensors, shapes, dtypes)
    for one, its_files in by_dtype.items():
        parts = [tuple(chain.from_iterable(tensors[n].parts for n in names)) for names in its_files]
        of_parts = {name: prod(shape) * one.itemsize for name, shape in shapes.items()}
        for names_of in _batches(parts, of_parts, groups.layout.world_size):
            gathered = _gathered(params, sources, names_of, shapes, groups, one)
            on_the_disk(partial(writer.write, gathered))
    if is_critic:
        on_the_disk(write_head, has_part=writes_head)
    on_the_disk(finish, has_part=groups.is_main)


class _FileSequence:
    """Writes whole parts to their files; all parts of a file must come one after the other."""

    def __init__(
        self,
        directory: Path,
        files: Sequence[tuple[str, ...]],
        tensors: Mapping[str, Stack],
        shapes: Shapes,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """files: the names of the tensors in each; shapes: of the parts of these."""
        self._directory, self._files, self._shapes, self._dtypes = directory, files, shapes, dtypes
        self._tensors, self._places = tensors, Places(shapes, tensors.values())
        self._number_of = {name: number for number, names in enumerate(files) for name in names}
        self._writer: TensorFileWriter | None = None

    def write(self, parts: Mapping[str, Tensor]) -> None:
        for part, values in parts.items():
            name = self._places.name(part)
            names = self._files[self._number_of[name]]
            if self._writer is None:
                self._writer = self._open(self._number_of[name])
            self._writer.write(name, self._places.box(part, whole(self._shapes[part])), values)
            if part == self._tensors[names[-1]].parts[-1]:
                self._writer.close()
                self._writer = None

    def _open(self, number: int) -> TensorFileWriter:
        return TensorFileWriter(
            self._directory / file_name(number, len(self._files)),
            {name: (self._dtypes[name], self._tensors[name].shape) for name in self._files[number]},
        )


def _files_by_dtype(
    nbytes: Mapping[str, int], dtypes: Mapping[str, torch.dtype], limit_bytes: int
) -> dict[torch.dtype, list[tuple[str, ...]]]:
    """The tensors of each file; those of one dtype travel together, so it has files of its own."""
    return {
        dtype: plan_files({n: b for n, b in nbytes.items() if dtypes[n] == dtype}, limit_bytes)
        for dtype in dict.fromkeys(dtypes.values())
    }


def _gathered(
    params: Mapping[str, Tensor],
    sources: Sequence[Holders],
    names_of: Sequence[Sequence[str]],
    shapes: Shapes,
    groups: Groups,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The whole tensors of this rank's batch; every rank calls it, with the batches of all."""
    own = {name: torch.empty(shapes[name], dtype=dtype) for name in names_of[groups.rank]}
    execute(
        _plan(sources, names_of, shapes, groups, dtype),
        params,
        own,
        group=groups.bridge,
        dtype=dtype,
        device=groups.platform.current_device(),
        after_bucket=lambda _: None,
    )
    return own


def _batches(
    files: Sequence[tuple[str, ...]], nbytes: Mapping[str, int], world: int
) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Round after round, the names of the tensors that each rank gathers and writes."""
    of_ranks = [
        [
            batch
            for names in files[rank::world]
            for batch in plan_files({name: nbytes[name] for name in names}, BATCH_BYTES)
        ]
        for rank in range(world)
    ]
    yield from zip_longest(*of_ranks, fillvalue=())


def _plan(
    sources: Sequence[Holders],
    names_of: Sequence[Sequence[str]],
    shapes: Shapes,
    groups: Groups,
    dtype: torch.dtype,
) -> Plan:
    targets = [
        Holders(ranks=(owner,), pieces=tuple(hf_pieces({name: shapes[name] for name in names})))
        for owner, names in enumerate(names_of)
    ]
    return build_plan(
        sources,
        targets,
        rank=groups.rank,
        itemsize=dtype.itemsize,
        bucket_bytes=BATCH_BYTES,
        nodes=groups.nodes,
    )
