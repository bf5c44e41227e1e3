"""Graded rollouts of some iterations on disk, to train from them again: same bits, no engine.

debug/iteration_000012/rank_<n>.pt, in the run's directory, holds the groups of one rank.
"""

import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_rl.errors import InputError
from megatron_rl.metrics.meter import Meter
from megatron_rl.parallel.groups import Groups
from megatron_rl.rollout.plain import group_of, plain_group
from megatron_rl.rollout.rounds import RoundsPlan, round_metrics
from megatron_rl.rollout.without_engine import WithoutEngine
from megatron_rl.types import Prompt, RolloutGroup

FOLDER = "debug"
NAME = re.compile(r"iteration_(\d{6,})")


class RolloutRecord:
    """Writes this rank's groups of the newest iterations; every rank has one."""

    def __init__(self, directory: Path, groups: Groups, *, num_iterations: int) -> None:
        """directory: the run's. num_iterations: how many stay; 0: only what `write` is told to."""
        self._folder, self._groups = directory / FOLDER, groups
        self._num_iterations = num_iterations

    def keep(self, graded: Sequence[RolloutGroup], iteration: int) -> None:
        """Write the groups where the recipe asks for it, and drop those of older iterations."""
        if not self._num_iterations:
            return
        self.write(graded, iteration)
        if self._groups.is_main:
            for older in recorded(self._folder):
                if older <= iteration - self._num_iterations:
                    shutil.rmtree(_directory(self._folder, older), ignore_errors=True)

    def write(self, graded: Sequence[RolloutGroup], iteration: int) -> Path:
        """Write this rank's groups; gives back the directory of the iteration."""
        directory = _directory(self._folder, iteration)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"rank_{self._groups.rank}.pt"
        content = {
            "world_size": self._groups.layout.world_size,
            "groups": [plain_group(group) for group in graded],
        }
        new = path.with_suffix(".new")
        torch.save(content, new)
        new.replace(path)
        return directory


def no_prompts(count: int) -> list[Prompt]:
    """What there is where a batch is never filled."""
    return []


class ReplayedRollouts(WithoutEngine):
    """Recorded rollouts in the place of sampled ones."""

    def __init__(
        self,
        source: Path,
        groups: Groups,
        meter: Meter,
        *,
        reward_parts: Sequence[str] = (),
        rounds: RoundsPlan | None = None,
        more: Callable[[int], list[Prompt]] = no_prompts,
        with_experts: bool = False,
        with_support: bool = False,
    ) -> None:
        """Args:
        source: a run's directory with recorded rollouts.
        rounds: the rule of the run's rounds, where there are any.
        more: takes so many further prompts of the run.
        with_experts: the recorded choice of experts is trained by, too.
        with_support: the recorded responses were drawn with top-k, and are scored so.
        """
        self._with_support = with_support
        self._with_experts = with_experts
        self._folder, self._groups, self._meter = source / FOLDER, groups, meter
        self._reward_parts, self._rounds, self._more = tuple(reward_parts), rounds, more

    def generate(
        self, prompts: Sequence[Prompt], *, iteration: int, policy_version: int
    ) -> list[RolloutGroup]:
        groups = self._read(iteration)
        if self._rounds is not None and self._rounds.config.fill:
            prompts = [*prompts, *self._more(max(0, len(groups) - len(prompts)))]
        asked = sorted(prompt.group_id for prompt in prompts)
        if sorted(group.prompt.group_id for group in groups) != asked:
            raise InputError(
                f"{_directory(self._folder, iteration)}: its rollouts are to other prompts than "
                f"iteration {iteration} of this run has. Replay from a checkpoint and a recipe of "
                "the run that recorded them"
            )
        self._check_experts(groups, iteration)
        self._check_support(groups, iteration)
        return [
            group if self._with_experts else _without_experts(group) for group in self._own(groups)
        ]

    def _check_experts(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        told = (rollout.experts is not None for group in groups for rollout in group.rollouts)
        if self._with_experts and not all(told):
            raise InputError(
                f"{_directory(self._folder, iteration)}: its rollouts do not say which experts the "
                "engine chose. Set rollout.routing_replay=false, or record them with it"
            )

    def _check_support(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Scored under another distribution than they were drawn from, they would teach wrongly."""
        told = {rollout.support is not None for group in groups for rollout in group.rollouts}
        if told <= {self._with_support}:
            return
        drawn, way_out = "a part of the vocabulary", "as the run had them that recorded them"
        if self._with_support:
            drawn, way_out = "the whole vocabulary", "to -1 and 1"
        raise InputError(
            f"{_directory(self._folder, iteration)}: its rollouts were drawn from {drawn}. Set "
            f"rollout.top_k and rollout.top_p {way_out}"
        )

    def count(self, groups: Sequence[RolloutGroup]) -> None:
        self._meter.count(groups, self._reward_parts)
        if self._rounds is not None:
            self._meter.report(round_metrics(groups, self._rounds, self._groups.world))

    def describe(self) -> list[str]:
        found = recorded(self._folder)
        return [
            f"rollouts: those that {self._folder} holds, of iterations "
            f"{', '.join(map(str, found))}; no engine, no evaluation"
        ]

    def _read(self, iteration: int) -> list[RolloutGroup]:
        """The groups of all ranks, in the order of ranks."""
        directory = _directory(self._folder, iteration)
        try:
            first = torch.load(directory / "rank_0.pt", weights_only=True)
            parts = [first] + [
                torch.load(directory / f"rank_{rank}.pt", weights_only=True)
                for rank in range(1, first["world_size"])
            ]
            self._sizes = [len(part["groups"]) for part in parts]
            return [group_of(plain) for part in parts for plain in part["groups"]]
        except (OSError, pickle.UnpicklingError, RuntimeError, LookupError, TypeError) as error:
            why = str(error).partition("\n")[0][:100]
            found = ", ".join(map(str, recorded(self._folder))) or "none"
            raise InputError(
                f"debug.replay={str(self._folder.parent)!r}: iteration {iteration} cannot be read "
                f"({type(error).__name__}: {why}); recorded are {found}. Set run.num_iterations to "
                "the last of them, and start from the checkpoint before the first"
            ) from error

    def _own(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """This rank's: those that it had, or, among another number of ranks, its share."""
        rank, world_size = self._groups.rank, self._groups.layout.world_size
        if len(self._sizes) != world_size:
            return list(groups[rank::world_size])
        start = sum(self._sizes[:rank])
        return list(groups[start : start + self._sizes[rank]])


def recorded(folder: Path) -> list[int]:
    """The iterations that a folder holds, in order."""
    if not folder.is_dir():
        return []
    names = (NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(name[1]) for name in names if name)


def _directory(folder: Path, iteration: int) -> Path:
    return folder / f"iteration_{iteration:06d}"


def _without_experts(group: RolloutGroup) -> RolloutGroup:
    return replace(group, rollouts=tuple(replace(r, experts=None) for r in group.rollouts))
