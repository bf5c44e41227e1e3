"""One checkpoint on its way to the disk: planned, copied if asked for, written, listed, named."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.checkpoint import manifest
from megatron_rl.checkpoint.host_copies import HostCopies
from megatron_rl.checkpoint.model_files import ModelFiles
from megatron_rl.checkpoint.names import STATE, name_of
from megatron_rl.checkpoint.random_states import random_states
from megatron_rl.checkpoint.retention import remove, remove_unfinished
from megatron_rl.checkpoint.versions import WRITTEN_BY
from megatron_rl.megatron.checkpoint import writer_of
from megatron_rl.megatron.faults import installed_version
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.parallel.collectives import all_gather_objects, all_or_none, nothing, sum_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.disk import sync
from megatron_rl.weights.room import Room


class Save:
    """One save; every rank makes one, calls the same methods in the same order, and all fail or
    none.

    Files stand in a temporary directory until the manifest is complete, then one rename gives them
    their name. Where a save fails, that directory is removed.
    """

    def __init__(
        self,
        directory: Path,
        iteration: int,
        models: Sequence[TrainedModel],
        state: dict[str, Any],
        files: ModelFiles,
        groups: Groups,
        own_files: Mapping[str, Any],
    ) -> None:
        """Plan who writes what, and look whether there is room.

        Args:
            directory: of the run's checkpoints.
            iteration: that is done.
            models: whose weights and optimizers are saved.
            state: what a resume needs besides, as JSON has it.
            files: the models' other files.
            groups: whose `world` and `bridge` nobody else uses until the save is complete.
            own_files: what torch saves besides of this rank, by the name of its file.

        Raises:
            RunError: there is no room on the disk.
        """
        self._directory, self._iteration, self._groups = directory, iteration, groups
        self._files, self._own = files, own_files
        attempt = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(attempt, src=0, group=groups.world)
        self._temporary = directory / f".{self.name}.{attempt[0]}"
        self._state = {
            **state,
            "models": {model.name: model.state_dict() for model in models},
            "layout": list(groups.layout.sizes),
            WRITTEN_BY: installed_version(),
        }
        self._random_states = random_states(files.groups.platform)
        self._room = Room("the checkpoint", directory)
        with self._removed_if_it_fails():
            self._on_the_disk(lambda: self._prepare(models), only_main=True)
            self._writers = [writer_of(m, self._temporary / m.name, groups) for m in models]
            needed = sum_over([sum(w.num_bytes for w in self._writers)], groups.world)
            needed_bytes = self._room.needed + int(needed[0]) + files.num_bytes
            self._room = replace(self._room, needed=needed_bytes)
            self._on_the_disk(self._room.look, only_main=True)

    @property
    def name(self) -> str:
        return name_of(self._iteration)

    def hold(self) -> None:
        """Copy to host memory what is to be written: from here on the models may change."""
        copies = HostCopies()
        for writer in self._writers:
            writer.hold(copies.of)
        self._files = self._files.held(copies.of, self._groups)

    def complete(self) -> None:
        """Write everything and give it its name.

        Raises:
            RunError: the disk is full; checkpoints from before are as they were.
        """
        with self._removed_if_it_fails():
            self._on_the_disk(self._write)
            for writer in self._writers:
                writer.gather()
            self._on_the_disk(self._finish)
            self._files.add_to(self._temporary)
            listed: dict[str, tuple[int, str]] = {}
            self._on_the_disk(lambda: listed.update(self._own_files()))
            files = {
                name: entry
                for part in all_gather_objects(listed, self._groups.world)
                for name, entry in part.items()
            }
            self._on_the_disk(lambda: self._give_name(files), only_main=True)

    def _prepare(self, models: Sequence[TrainedModel]) -> None:
        self._directory.mkdir(exist_ok=True)  # in the run's, which is there, or somebody removed it
        remove_unfinished(self._directory)
        for model in models:
            (self._temporary / model.name).mkdir(parents=True)

    def _write(self) -> None:
        for writer in self._writers:
            writer.write()
        own = {f"rank_{self._groups.rank}.pt": self._random_states, **self._own}
        for name, content in own.items():
            torch.save(content, self._temporary / name)
        if self._groups.is_main:
            (self._temporary / STATE).write_text(json.dumps(self._state, indent=2) + "\n")

    def _finish(self) -> None:
        for writer in self._writers:
            writer.finish()

    def _own_files(self) -> dict[str, tuple[int, str]]:
        """Size and digest of this rank's share of the files, which are on the disk from here on."""
        world, rank = self._groups.layout.world_size, self._groups.rank
        listed = {}
        for path in sorted(manifest.files_in(self._temporary))[rank::world]:
            sync(path)
            name = str(path.relative_to(self._temporary))
            listed[name] = (path.stat().st_size, manifest.digest_of(path))
        return listed

    def _give_name(self, files: dict[str, tuple[int, str]]) -> None:
        """Write the manifest, and give the directory the name of a checkpoint."""
        world_size = self._groups.layout.world_size
        manifest.write_manifest(self._temporary, self._iteration, world_size, files)
        final = self._directory / self.name
        if final.exists():  # rejected at the start, and repeated since
            remove(final)
        self._temporary.rename(final)
        sync(self._directory)

    def _on_the_disk(self, work: Callable[[], None], *, only_main: bool = False) -> None:
        together(lambda: self._room.naming_full_disk(work), self._groups, only_main=only_main)

    @contextmanager
    def _removed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._groups.is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)  # it may be what fills the disk
            raise


def together(work: Callable[[], None], groups: Groups, *, only_main: bool = False) -> None:
    """Do work that needs no other rank; an error of any rank is raised on all."""
    has_part = groups.is_main or not only_main
    all_or_none(work if has_part else nothing, groups.world)
