"""Checkpoints that are complete or not there, and loading the newest good one.

iteration_000120/
    policy/          Megatron-Core distributed checkpoint: weights, optimizer (any layout)
    critic/          the same of the critic, where there is one
    hf/              the policy as a Hugging Face directory, where checkpoint.export_hf is set
    rank_<n>.pt      random states of one rank
    state.json       iteration, cursor, scheduler, policy_version, version of Megatron-Core
    MANIFEST.json    written last: every file with its size and SHA-256
"""

import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.checkpoint.versions import STATE, WRITTEN_BY
from megatron_rl.errors import RunError
from megatron_rl.megatron.checkpoint import load_model, save_model
from megatron_rl.megatron.faults import installed_version
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.parallel.collectives import all_gather_objects, all_or_none, nothing
from megatron_rl.parallel.groups import Groups

MANIFEST = "MANIFEST.json"
FORMAT = 2
NAME = re.compile(r"iteration_(\d{6,})")


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, groups: Groups, *, keep_last: int) -> None:
        self._directory, self._groups, self._keep_last = directory, groups, keep_last

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
        """
        attempt = [uuid.uuid4().hex[:12]]
        dist.broadcast_object_list(attempt, src=0, group=self._groups.world)
        temporary = self._directory / f".{_name(iteration)}.{attempt[0]}"
        self._together(lambda: self._prepare(temporary, models), only_main=True)
        self._together(lambda: self._write(temporary, models, state))
        self._together(lambda: add_files(temporary))
        files = all_gather_objects(self._own_files(temporary), self._groups.world)
        self._together(lambda: self._finish(temporary, iteration, files), only_main=True)

    def load(self, models: Sequence[TrainedModel]) -> dict[str, Any] | None:
        """Restore the newest good checkpoint; its state, or None where there is no checkpoint.

        Raises:
            RunError: checkpoints are there and none is good. A run never starts afresh over them.
        """
        rejected: list[str] = []
        for path in self._newest_first():
            reasons = [
                reason
                for reason in all_gather_objects(self._fault(path), self._groups.world)
                if reason
            ]
            if reasons:
                rejected.append(f"{path.name}: {reasons[0]}")
                continue
            state: dict[str, Any] = json.loads((path / STATE).read_text())
            self._together(functools.partial(self._restore, path, models, state))
            return {**state, "rejected": rejected}
        if rejected:
            raise RunError(
                f"{self._directory}: no usable checkpoint: {'; '.join(rejected)}. Remove them to "
                "start again"
            )
        return None

    def is_empty(self) -> bool:
        return not self._newest_first()

    # -- saving ----------------------------------------------------------------------------------

    def _prepare(self, temporary: Path, models: Sequence[TrainedModel]) -> None:
        for leftover in self._directory.glob(".iteration_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for model in models:
            (temporary / model.name).mkdir(parents=True)

    def _write(
        self, temporary: Path, models: Sequence[TrainedModel], state: dict[str, Any]
    ) -> None:
        for model in models:
            save_model(model, temporary / model.name)
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
        """Size and digest of this rank's share of the files."""
        world, rank = self._groups.layout.world_size, self._groups.rank
        return {
            str(path.relative_to(temporary)): (path.stat().st_size, _digest(path))
            for path in sorted(_files(temporary))[rank::world]
        }

    def _finish(
        self, temporary: Path, iteration: int, files: list[dict[str, tuple[int, str]]]
    ) -> None:
        listed = {name: entry for part in files for name, entry in part.items()}
        manifest = temporary / MANIFEST
        with manifest.open("w") as file:
            json.dump({"format": FORMAT, "iteration": iteration, "files": listed}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        final = self._directory / _name(iteration)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for path in self._newest_first()[self._keep_last :]:
            shutil.rmtree(path, ignore_errors=True)

    # -- loading ---------------------------------------------------------------------------------

    def _newest_first(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        found = [path for path in self._directory.iterdir() if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.name, reverse=True)

    def _fault(self, path: Path) -> str | None:
        """Why a checkpoint must not be loaded; every rank checks its share of the files."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            files = manifest["files"]
        except (OSError, ValueError, KeyError):
            return f"no readable {MANIFEST}"
        if manifest.get("format") != FORMAT:
            return f"format {manifest.get('format')} is not {FORMAT}"
        share = sorted(files)[self._groups.rank :: self._groups.layout.world_size]
        for name in share:
            size, digest = files[name]
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _digest(file) != digest:
                return f"{name} was changed after it was written"
        return None

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
        has_part = self._groups.is_main or not only_main
        all_or_none(work if has_part else nothing, self._groups.world)


def _plain(states: dict[str, Any]) -> dict[str, Any]:
    """Random states as tensors, numbers and tuples, which load without running code."""
    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, keys.tolist(), *rest)}


def _restored(states: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    kind, keys, *rest = states["numpy"]
    return {**states, "numpy": (kind, np.array(keys, dtype=np.uint32), *rest)}


def _name(iteration: int) -> str:
    return f"iteration_{iteration:06d}"


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
