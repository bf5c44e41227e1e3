"""The models of a run as files that start another run, or that other programs read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.parallel.collectives import all_or_none, nothing
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.critic import Critic
from megatron_rl.weights.export import export_hf
from megatron_rl.weights.hf_files import copy_companions
from megatron_rl.weights.model_source import COMPANION_DIR
from megatron_rl.weights.room import Room

HF_DIR = "hf"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What this rank has of a model's weights."""

    params: Mapping[str, Tensor]
    value_head: Tensor | None

    @classmethod
    def of(cls, model: TrainedModel) -> "Weights":
        value_head = model.value_head if isinstance(model, Critic) else None
        return cls(params=model.named_parameters(), value_head=value_head)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Writes the policy and, where there is one, the critic; every rank has one."""

    models: Sequence[TrainedModel]
    groups: Groups
    config_dir: Path  # config.json and tokenizer of both
    config: CheckpointConfig
    copies: Mapping[str, Weights] = field(default_factory=dict)
    """Weights by the names of their models, in the place of those that the models have."""

    @property
    def num_bytes(self) -> int:
        """The bytes of the exported weights, of all ranks together."""
        if not self.config.export_hf:
            return 0
        return sum(model.arch.num_parameters * model.dtype.itemsize for model in self.models)

    def held(self, copy: Callable[[Tensor], Tensor], groups: Groups) -> "ModelFiles":
        """The same of copies of the weights, over groups, so that models may change meanwhile."""
        copies = {}
        for model in self.models if self.config.export_hf else ():
            weights = Weights.of(model)
            copies[model.name] = Weights(
                params={name: copy(tensor) for name, tensor in weights.params.items()},
                value_head=None if weights.value_head is None else copy(weights.value_head),
            )
        return replace(self, groups=groups, copies=copies)

    def add_to(self, checkpoint: Path) -> None:
        """Add the export, and config and tokenizer, with which weights load and convert alone."""
        room = Room("the checkpoint", checkpoint)
        copy = partial(room.naming_full_disk, partial(self._copy_companions, checkpoint))
        all_or_none(copy if self.groups.is_main else nothing, self.groups.world)
        self.export_to(checkpoint)

    def _copy_companions(self, checkpoint: Path) -> None:
        for model in self.models:
            copy_companions(self.config_dir, checkpoint / model.name / COMPANION_DIR)

    def export_to(self, directory: Path) -> Path | None:
        """Write the policy to directory/hf, the critic to critic/ in it; None: not asked for."""
        if not self.config.export_hf:
            return None
        output = directory / HF_DIR
        for model in self.models:
            is_critic = isinstance(model, Critic)
            weights = self.copies.get(model.name) or Weights.of(model)
            export_hf(
                weights.params,
                model.arch,
                self.groups,
                source=self.config_dir,
                output=output / model.name if is_critic else output,
                dtype=model.dtype,
                file_mib=self.config.export_file_mib,
                value_head=weights.value_head,
                is_critic=is_critic,
            )
        return output
