"""The models of a run as files that start another run, or that other programs read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.critic import Critic
from megatron_rl.weights.export import export_hf
from megatron_rl.weights.hf_files import copy_companions
from megatron_rl.weights.model_source import COMPANION_DIR

HF_DIR = "hf"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Writes the policy and, where there is one, the critic; every rank has one."""

    models: Sequence[TrainedModel]
    groups: Groups
    config_dir: Path  # config.json and tokenizer of both
    config: CheckpointConfig

    def add_to(self, checkpoint: Path) -> None:
        """Add the export, and config and tokenizer, with which weights load and convert alone."""
        if self.groups.is_main:
            for model in self.models:
                copy_companions(self.config_dir, checkpoint / model.name / COMPANION_DIR)
        self.export_to(checkpoint)

    def export_to(self, directory: Path) -> Path | None:
        """Write the policy to directory/hf, the critic to critic/ in it; None: not asked for."""
        if not self.config.export_hf:
            return None
        output = directory / HF_DIR
        for model in self.models:
            is_critic = isinstance(model, Critic)
            export_hf(
                model.named_parameters(),
                model.arch,
                self.groups,
                source=self.config_dir,
                output=output / model.name if is_critic else output,
                dtype=model.dtype,
                file_mib=self.config.export_file_mib,
                value_head=model.value_head if isinstance(model, Critic) else None,
                is_critic=is_critic,
            )
        return output
