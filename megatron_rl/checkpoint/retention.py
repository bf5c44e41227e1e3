"""Which checkpoints of a run stay on disk."""

import json
import shutil
import uuid
from collections.abc import Set
from pathlib import Path

from megatron_rl.checkpoint import manifest
from megatron_rl.checkpoint.config import CheckpointConfig
from megatron_rl.checkpoint.names import SCORE, STATE, checkpoints_in, iteration_of

UNFINISHED = ".iteration_*"
"""A checkpoint that is being written or deleted; the next start removes it."""


def retire(
    directory: Path,
    saved: str,
    config: CheckpointConfig,
    *,
    verified: Set[str],
    rejected: Set[str],
) -> None:
    """Delete good checkpoints that the recipe does not keep; damaged ones count for nothing.

    Args:
        directory: of the run's checkpoints.
        saved: the name of the one that was just written, which always stays.
        config: says how many stay, and which besides.
        verified: names whose contents this process has seen in order; of others, the manifest and
            the sizes of the files decide.
        rejected: names whose contents it has seen damaged.
    """
    good = [
        path
        for path in checkpoints_in(directory)
        if path.name not in rejected and (path.name in verified or manifest.looks_complete(path))
    ]
    kept = {saved}
    if config.keep_every:
        kept |= {path.name for path in good if iteration_of(path) % config.keep_every == 0}
    if config.keep_best is not None:
        scored = {path: score for path in good if (score := score_of(path)) is not None}
        kept |= {path.name for path in scored if scored[path] == max(scored.values())}
    for path in good[config.keep_last :]:
        if path.name not in kept:
            remove(path)


def score_of(checkpoint: Path) -> float | None:
    """The value of checkpoint.keep_best that its iteration had; None where it had none."""
    try:
        score = json.loads((checkpoint / STATE).read_text())[SCORE]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return score if isinstance(score, float) else None


def remove(path: Path) -> None:
    """Delete a checkpoint, whose name goes first: a half deleted one must not look like one."""
    leaving = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    path.rename(leaving)
    if leaving.is_dir() and not leaving.is_symlink():
        shutil.rmtree(leaving, ignore_errors=True)
    else:
        leaving.unlink()


def remove_unfinished(directory: Path) -> None:
    for leftover in directory.glob(UNFINISHED):
        shutil.rmtree(leftover, ignore_errors=True)
