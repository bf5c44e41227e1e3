"""Checkpoints that are complete or not there, and loading the newest good one.

iteration_000120/
    policy/          Megatron-Core distributed checkpoint: weights, optimizer (any layout)
    critic/          the same of the critic, where there is one
    hf/              the policy as a Hugging Face directory, where checkpoint.export_hf is set
    rank_<n>.pt      random states of one rank
    state.json       iteration, cursor, scheduler, policy_version, version of Megatron-Core
    MANIFEST.json    written last: every file with its size and SHA-256

A directory whose name begins with a point is a checkpoint that is being written or deleted; the
next start removes it.
"""

import functools
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.checkpoint import manifest
from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.checkpoint.names import STATE, checkpoints_in, name_of
from megatron_rl.checkpoint.retention import remove, remove_unfinished, retire
from megatron_rl.checkpoint.room import ROOM_FOR_THE_REST, check_room, naming_full_disk
from megatron_rl.checkpoint.versions import WRITTEN_BY
from megatron_rl.errors import RunError
from megatron_rl.megatron.checkpoint import load_model, writer_of
from megatron_rl.megatron.faults import installed_version
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.megatron.writer import CheckpointWriter
from megatron_rl.parallel.collectives import all_gather_objects, all_or_none, nothing, sum_over
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.disk import sync


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, groups: Groups, config: CheckpointConfig) -> None:
        self._directory, self._groups, self._config = directory, groups, config
        self._verified: set[str] = set()  # names whose contents this process has seen in order
        self._rejected: set[str] = set()

    def save(
        self,
        iteration: int,
        models: Sequence[TrainedModel],
        state: dict[str, Any],
        *,
        add_files: Callable[[Path], None],
    ) -> None:
        """Write everything a resume needs; every rank calls it, and all fail or none.

        add_files writes what else belongs to the checkpoint into its directory; on every rank.
        The files stand in a temporary directory until the manifest is complete, then one rename
        gives them their name.

        Raises:
            RunError: the disk is full; checkpoints from before are as they were.
        """
        attempt = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(attempt, src=0, group=self._groups.world)
        temporary = self._directory / f".{name_of(iteration)}.{attempt[0]}"
        try:
            self._write_all(temporary, iteration, models, state, add_files)
        except BaseException:
            if self._groups.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
            raise

    def load(self, models: Sequence[TrainedModel]) -> dict[str, Any] | None:
        """Restore the newest good checkpoint; its state, or None where there is no checkpoint.

        Raises:
            RunError: checkpoints are there and none is good. A run never starts afresh over them.
        """
        self._together(lambda: remove_unfinished(self._directory), only_main=True)
        rejected: list[str] = []
        for path in checkpoints_in(self._directory):
            reason = self._fault(path)
            if reason:
                rejected.append(f"{path.name}: {reason}")
                self._rejected.add(path.name)
                continue
            state: dict[str, Any] = json.loads((path / STATE).read_text())
            self._restore(path, models, state)
            self._verified.add(path.name)
            return {**state, "rejected": rejected}
        if rejected:
            raise RunError(
                f"{self._directory}: no usable checkpoint: {'; '.join(rejected)}. Remove them to "
                "start again"
            )
        return None

    def is_empty(self) -> bool:
        return not checkpoints_in(self._directory)

    # -- saving ----------------------------------------------------------------------------------

    def _write_all(
        self,
        temporary: Path,
        iteration: int,
        models: Sequence[TrainedModel],
        state: dict[str, Any],
        add_files: Callable[[Path], None],
    ) -> None:
        self._together(functools.partial(self._prepare, temporary, models), only_main=True)
        writers = [writer_of(model, temporary / model.name, self._groups) for model in models]
        needed = int(sum_over([sum(w.num_bytes for w in writers)], self._groups.world)[0])
        needed += self._export_bytes(models) + ROOM_FOR_THE_REST

        def on_the_disk(work: Callable[[], None], *, only_main: bool = False) -> None:
            self._together(
                lambda: naming_full_disk(work, self._directory, needed), only_main=only_main
            )

        on_the_disk(lambda: check_room(self._directory, needed), only_main=True)
        on_the_disk(lambda: self._write(temporary, models, state, writers))
        for writer in writers:
            writer.gather()
        on_the_disk(lambda: _finish_all(writers))
        add_files(temporary)
        listed: dict[str, tuple[int, str]] = {}
        on_the_disk(lambda: listed.update(self._own_files(temporary)))
        files = {
            name: entry
            for part in all_gather_objects(listed, self._groups.world)
            for name, entry in part.items()
        }
        on_the_disk(lambda: self._name(temporary, iteration, files), only_main=True)
        self._verified.add(name_of(iteration))
        self._rejected.discard(name_of(iteration))
        self._together(lambda: self._retire(name_of(iteration)), only_main=True)

    def _export_bytes(self, models: Sequence[TrainedModel]) -> int:
        if not self._config.export_hf:
            return 0
        return sum(model.arch.num_parameters * model.dtype.itemsize for model in models)

    def _prepare(self, temporary: Path, models: Sequence[TrainedModel]) -> None:
        remove_unfinished(self._directory)
        for model in models:
            (temporary / model.name).mkdir(parents=True)

    def _write(
        self,
        temporary: Path,
        models: Sequence[TrainedModel],
        state: dict[str, Any],
        writers: Sequence[CheckpointWriter],
    ) -> None:
        for writer in writers:
            writer.write()
        states = self._groups.platform.rng_state()
        torch.save(_plain(states), temporary / f"rank_{self._groups.rank}.pt")
        if self._groups.is_main:
            layout = self._groups.layout
            saved = {
                **state,
                "models": {model.name: model.state_dict() for model in models},
                "layout": [layout.world_size, layout.tp, layout.pp, layout.vpp],
                WRITTEN_BY: installed_version(),
            }
            (temporary / STATE).write_text(json.dumps(saved, indent=2) + "\n")

    def _own_files(self, temporary: Path) -> dict[str, tuple[int, str]]:
        """Size and digest of this rank's share of the files, which are on the disk from here on."""
        world, rank = self._groups.layout.world_size, self._groups.rank
        listed = {}
        for path in sorted(manifest.files_in(temporary))[rank::world]:
            sync(path)
            name = str(path.relative_to(temporary))
            listed[name] = (path.stat().st_size, manifest.digest_of(path))
        return listed

    def _name(self, temporary: Path, iteration: int, files: dict[str, tuple[int, str]]) -> None:
        """Write the manifest, and give the directory the name of a checkpoint."""
        manifest.write_manifest(temporary, iteration, self._groups.layout.world_size, files)
        final = self._directory / name_of(iteration)
        if final.exists():  # rejected at the start, and repeated since
            remove(final)
        temporary.rename(final)
        sync(self._directory)

    def _retire(self, saved: str) -> None:
        verified, rejected = self._verified, self._rejected
        retire(self._directory, saved, self._config, verified=verified, rejected=rejected)

    # -- loading ---------------------------------------------------------------------------------

    def _fault(self, path: Path) -> str | None:
        """Why a checkpoint must not be loaded; every rank checks its share of the files."""
        share = slice(self._groups.rank, None, self._groups.layout.world_size)
        found: list[str | None] = [None]

        def look() -> None:
            found[0] = manifest.fault_of(path, share)

        self._together(look)
        return next((one for one in all_gather_objects(found[0], self._groups.world) if one), None)

    def _restore(self, path: Path, models: Sequence[TrainedModel], state: dict[str, Any]) -> None:
        names = [model.name for model in models]
        if sorted(state["models"]) != sorted(names):
            raise RunError(
                f"{path}: it holds {', '.join(state['models'])}, this recipe trains "
                f"{', '.join(names)}. Use another run.output_dir, or the recipe it was made with"
            )
        for model in models:
            load_model(model, path / model.name)
            model.load_state_dict(state["models"][model.name])
        layout = self._groups.layout
        # Random states belong to ranks, so they do not fit another layout.
        if state["layout"] == [layout.world_size, layout.tp, layout.pp, layout.vpp]:
            states = torch.load(path / f"rank_{self._groups.rank}.pt", weights_only=True)
            self._groups.platform.set_rng_state(_restored(states))

    def _together(self, work: Callable[[], None], *, only_main: bool = False) -> None:
        """Do work that needs no other rank; an error of any rank is raised on all."""
        has_part = self._groups.is_main or not only_main
        all_or_none(work if has_part else nothing, self._groups.world)


def _finish_all(writers: Sequence[CheckpointWriter]) -> None:
    for writer in writers:
        writer.finish()


def _plain(states: dict[str, Any]) -> dict[str, Any]:
    """Random states as tensors, numbers and tuples, which load without running code."""
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, keys.tolist(), *rest)}


def _restored(states: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, np.array(keys, dtype=np.uint32), *rest)}
