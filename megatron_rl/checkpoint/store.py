"""Checkpoints that are complete or not there, and loading the newest good one.

iteration_000120/
    policy/          Megatron-Core distributed checkpoint: weights, optimizer (any layout)
    critic/          the same of the critic, where there is one
    hf/              the policy as a Hugging Face directory, where checkpoint.export_hf is set
    rank_<n>.pt      random states of one rank
    ahead_<n>.pt     its part of what is sampled for the next iteration, under run.lag
    state.json       iteration, cursor, scheduler, policy_version, version of Megatron-Core
    MANIFEST.json    written last: every file with its size and SHA-256

A directory whose name begins with a point is a checkpoint that is being written or deleted; the
next start removes it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.checkpoint import manifest
from megatron_rl.checkpoint.background import Background
from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.checkpoint.model_files import ModelFiles
from megatron_rl.checkpoint.names import STATE, checkpoints_in
from megatron_rl.checkpoint.random_states import restore_random_states
from megatron_rl.checkpoint.retention import remove_unfinished, retire
from megatron_rl.checkpoint.save import Save, together
from megatron_rl.errors import RunError
from megatron_rl.megatron.checkpoint import load_model
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.parallel.collectives import all_gather_objects
from megatron_rl.parallel.groups import TIMEOUT, Groups
from megatron_rl.platforms.base import CPU

SECONDS_BETWEEN_LOOKS = 0.05


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, groups: Groups, config: CheckpointConfig) -> None:
        self._directory, self._groups, self._config = directory, groups, config
        # A save in the background talks over a group of its own, about tensors in host memory.
        self._saving_groups = groups
        if config.async_save:
            own = dist.new_group(backend="gloo", timeout=TIMEOUT)
            self._saving_groups = replace(groups, world=own, bridge=own, platform=CPU)
        self._background: Background | None = None
        self._verified: set[str] = set()  # names whose contents this process has seen in order
        self._rejected: set[str] = set()

    def save(
        self,
        iteration: int,
        models: Sequence[TrainedModel],
        state: dict[str, Any],
        files: ModelFiles,
        own_files: Mapping[str, Any] | None = None,
    ) -> None:
        """Write everything a resume needs; every rank calls it, and all fail or none.

        own_files: what torch is to save besides of this rank, by the name of its file.

        With checkpoint.async_save only its copy to host memory is waited for, and the end of the
        save before.

        Raises:
            RunError: the disk is full; checkpoints from before are as they were.
        """
        self.finish()
        save = Save(
            self._directory, iteration, models, state, files, self._saving_groups, own_files or {}
        )

        def complete() -> None:
            save.complete()
            self._verified.add(save.name)
            self._rejected.discard(save.name)
            together(lambda: self._retire(save.name), self._saving_groups, only_main=True)

        if self._config.async_save:
            save.hold()
            self._background = Background(complete)
        else:
            complete()

    def look(self) -> None:
        """Ask after the save in the background; every rank calls it once an iteration.

        Raises:
            RunError: it failed, on whatever rank.
        """
        if self._background is not None and self._background.is_over(self._groups.world):
            self._background = None

    def finish(self) -> None:
        """Wait for the save in the background; every rank calls it.

        Raises:
            RunError: it failed, on whatever rank.
        """
        self.look()
        while self._background is not None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.look()

    def load(self, models: Sequence[TrainedModel]) -> dict[str, Any] | None:
        """Restore the newest good checkpoint; its state, or None where there is no checkpoint.

        Raises:
            RunError: checkpoints are there and none is good. A run never starts afresh over them.
        """
        together(lambda: remove_unfinished(self._directory), self._groups, only_main=True)
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

    # -- loading ---------------------------------------------------------------------------------

    def _fault(self, path: Path) -> str | None:
        """Why a checkpoint must not be loaded; every rank checks its share of the files."""
        share = slice(self._groups.rank, None, self._groups.layout.world_size)
        found: list[str | None] = [None]

        def look() -> None:
            found[0] = manifest.fault_of(path, share)

        together(look, self._groups)
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
        # Random states belong to ranks, so they do not fit another layout.
        if state["layout"] == list(self._groups.layout.sizes):
            restore_random_states(path / f"rank_{self._groups.rank}.pt", self._groups.platform)

    def _retire(self, saved: str) -> None:
        verified, rejected = self._verified, self._rejected
        retire(self._directory, saved, self._config, verified=verified, rejected=rejected)
