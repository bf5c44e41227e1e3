"""A model by directory or hub name, whichever kind of checkpoint holds its weights.

Hugging Face: config.json, tokenizer and safetensors side by side. Megatron-Core: a distributed
checkpoint with `hf_config/` in it, which holds config.json and tokenizer. The path may be
the checkpoint's, or that of the directory with `latest_checkpointed_iteration.txt`, of a checkpoint
of one of our runs, or of the directory of those, which means the newest.
"""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.files import read_text
from megatron_rl.weights.critic_files import VALUE_HEAD_FILE
from megatron_rl.weights.dcp_files import METADATA
from megatron_rl.weights.hf_files import COMPANIONS, CONFIG, INDEX, weight_names

TRACKER = "latest_checkpointed_iteration.txt"
COMPANION_DIR = "hf_config"
POLICY_DIR = "policy"  # of one of our runs' checkpoints


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The directories with the parts of a model."""

    config_dir: Path
    """Holds config.json and the tokenizer."""

    megatron_dir: Path | None = None
    """The distributed checkpoint with the weights; None: they are in config_dir."""


def find_model(path: str, setting: str, config_path: str | None = None) -> ModelSource:
    """The model that a path or hub name means.

    Args:
        path: directory of either kind, or hub name.
        setting: the setting or option that named it, for messages.
        config_path: where config.json and tokenizer are, if not in the Megatron checkpoint.
    """
    directory = _local_model_dir(path, setting)
    megatron_dir = _distributed_dir(directory)
    if megatron_dir is None:
        return ModelSource(config_dir=directory)
    config_dir = megatron_dir / COMPANION_DIR
    if config_path is not None:
        config_dir = _local_model_dir(config_path, setting)
    if not (config_dir / CONFIG).is_file():
        raise InputError(
            f"{setting}={path!r}: {config_dir / CONFIG} is not there, so nothing says which model "
            f"this Megatron-Core checkpoint is. Copy config.json and the tokenizer of its Hugging "
            f"Face model to {config_dir}"
        )
    return ModelSource(config_dir=config_dir, megatron_dir=megatron_dir)


def _local_model_dir(path: str, setting: str) -> Path:
    """The directory itself, or the hub's files in the local cache (downloaded where missing).

    Of the weights only the files that its index names, or the one that needs no index: beside them
    a repository may hold the same weights in the form of another program, as Mistral's do.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise InputError(f"{setting}={path!r}: there is no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(path, allow_patterns=[*COMPANIONS, INDEX]))
        weights = [*map(glob.escape, weight_names(found)), VALUE_HEAD_FILE]
        snapshot_download(path, revision=found.name, allow_patterns=weights)  # of the same commit
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{setting}={path!r}: neither a directory here nor a model the hub gave us "
            f"({type(error).__name__}: {reason}). Name a local directory, or check the name and "
            "the network"
        ) from error
    return found


def _tracked(tracker: Path) -> str:
    try:
        return read_text(tracker).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{tracker}: cannot be read ({error}). Write the iteration into it"
        ) from error


def _distributed_dir(directory: Path) -> Path | None:
    """The distributed checkpoint that a directory is or means, if any."""
    for found in (directory, directory / POLICY_DIR):
        if (found / METADATA).is_file():
            return found
    tracker = directory / TRACKER
    if tracker.is_file():
        named = _tracked(tracker)
        found = directory / (f"iter_{int(named):07d}" if named.isdigit() else named)
        if not re.fullmatch(r"\d+|release", named) or not found.is_dir():
            raise InputError(
                f"{tracker}: it names {named!r}, and there is no {found.name} beside it"
            )
        return found
    ours = sorted(directory.glob(f"iteration_*/{POLICY_DIR}/{METADATA}"))
    return ours[-1].parent if ours else None
