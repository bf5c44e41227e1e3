"""The policy as a Hugging Face directory: one more reshard, from training ranks to files."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.critic_files import (
    critic_holders,
    without_lm_head,
    write_value_head,
)
from megatron_rl.weights.hf_files import file_name, plan_files, write_companions, write_tensors
from megatron_rl.weights.layouts import hf_pieces, hf_shapes
from megatron_rl.weights.pieces import whole
from megatron_rl.weights.plan import Holders, build_plan
from megatron_rl.weights.sync import RANKS_PER_NODE, training_holders
from megatron_rl.weights.transfer import execute


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
    """Write the weights with config and tokenizer of `source`; every rank calls it.

    A critic's directory has no LM head and, in a file of its own, value_head [1, H], which the
    ranks of the last pipeline stage bring along.

    Files are dealt out to the ranks and written one at a time, so a rank holds at most one file's
    tensors. `output` appears under its name only when it is complete.
    """
    sources, shapes = training_holders(arch, groups.layout), hf_shapes(arch)
    if is_critic:
        sources, shapes = critic_holders(sources), without_lm_head(shapes)
    files = plan_files(shapes, dtype.itemsize, file_mib << 20)
    temporary = output.with_name(f".{output.name}.part")
    if groups.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_companions(source, temporary, files, dtype)
    dist.barrier(group=groups.host)
    world = groups.layout.world_size
    for first in range(0, len(files), world):
        batch = dict(enumerate(files[first : first + world]))
        holders = [
            Holders(ranks=(rank,), pieces=tuple(hf_pieces({name: shapes[name] for name in names})))
            for rank, names in batch.items()
        ]
        plan = build_plan(
            sources,
            holders,
            rank=groups.rank,
            itemsize=dtype.itemsize,
            bucket_bytes=256 << 20,
            node_of=lambda rank: rank // RANKS_PER_NODE,
        )
        names = batch.get(groups.rank, ())
        tensors = {
            name: torch.empty([hi for _, hi in whole(shapes[name])], dtype=dtype) for name in names
        }
        execute(
            plan,
            params,
            tensors,
            group=groups.bridge,
            dtype=dtype,
            device=groups.platform.current_device(),
            after_bucket=lambda _: None,
        )
        if names:
            write_tensors(temporary / file_name(first + groups.rank, len(files)), tensors)
    if value_head is not None and groups.is_first_copy and groups.here.dp_rank == 0:
        write_value_head(temporary, value_head)
    dist.barrier(group=groups.host)
    if groups.is_main:
        shutil.rmtree(output, ignore_errors=True)
        temporary.rename(output)
    dist.barrier(group=groups.host)
