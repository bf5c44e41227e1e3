"""Our own writing of a distributed checkpoint, in the files that Megatron-Core reads.

Megatron-Core's own save forks a process for every file and keeps a manager process beside it. A
signal to the job's process group ends that one, and the next save waits for it for ever; killed
writers leave a rank waiting, and a killed rank leaves writers. Here a rank writes its file itself.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from megatron_rl.parallel.collectives import all_gather_objects, gather_objects
from megatron_rl.parallel.groups import Groups

FORMAT = CheckpointingConfig("torch_dist", 1)


class CheckpointWriter:
    """One model's state on its way into an existing, empty directory; every rank has one.

    What all ranks do together (`__init__`, `gather`) and what each does for itself (`hold`,
    `write`, `finish`) are apart, so that a rank's own error can be told to the others.
    """

    def __init__(self, state: dict[str, Any], directory: Path, groups: Groups) -> None:
        """Plan who writes what; nothing is written yet. state: Megatron's description."""
        self._directory, self._groups = directory, groups
        sharded, self._common = save_preprocess(state)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded, keep_only_main_replica=True
        )
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(
            mcore_to_pyt_state_dict(by_key, False), is_coordinator=groups.is_main
        )
        self._planner: SavePlanner = planner
        self._plan = planner.create_local_plan()
        plans = gather_objects(self._plan, groups.world)
        # It lists the tensors of all ranks, so only one needs it.
        self._index = planner.create_global_plan(plans)[1] if groups.is_main else None
        prefix = _StoragePrefix(f"__{groups.rank}_")
        self._plan = planner.finish_plan(replace(self._plan, storage_data=prefix))
        self._files = _Files(directory, sync_files=True)
        self._written: list[Any] = []

    @property
    def num_bytes(self) -> int:
        """The bytes of tensors that this rank writes."""
        tensors = (item.tensor_data for item in self._plan.items if item.tensor_data is not None)
        return sum(
            prod(tensor.chunk.sizes) * tensor.properties.dtype.itemsize for tensor in tensors
        )

    def hold(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Take copies of all that this rank writes: from here on the model may change."""
        self._planner = _Held(self._planner, self._plan.items, copy)
        self._common = deepcopy(self._common)

    def write(self) -> None:
        """Write this rank's file, and on the main rank what all ranks have in common."""
        if self._groups.is_main:
            torch.save(self._common, self._directory / COMMON_STATE_FNAME)
            save_config(FORMAT, str(self._directory))
        self._written = self._files.write_data(self._plan, self._planner).value()

    def gather(self) -> None:
        """Let the main rank know where in their files the ranks wrote what."""
        self._written = all_gather_objects(self._written, self._groups.world)

    def finish(self) -> None:
        """Write the index of all files, on the main rank."""
        if self._index is not None:
            self._files.finish(self._index, self._written)


class _Held(DefaultSavePlanner):
    """Gives the writing of files copies of what it asks for."""

    def __init__(
        self, stock: SavePlanner, items: Sequence[WriteItem], copy: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        found = {item.index: stock.resolve_data(item) for item in items}
        self._held = {
            index: copy(data) if isinstance(data, Tensor) else data for index, data in found.items()
        }

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._held[write_item.index]


class _Files(FileSystemWriter):
    """torch's files, without the name of the directory in them, which a rename changes."""

    def storage_meta(self) -> None:
        return None
