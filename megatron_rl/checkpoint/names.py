"""Names of a run's checkpoints and of the files in them."""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"  # of a run, in its directory
STATE = "state.json"  # of a checkpoint
MANIFEST = "MANIFEST.json"  # of a checkpoint
SCORE = "score"
"""The entry of STATE with the value of checkpoint.keep_best, where its iteration had one."""

OWED = "owed_metrics"
"""The entry of STATE with the metrics of its iteration, where a stop broke the evaluation off that
is to be recorded with them."""

NAME = re.compile(r"iteration_(\d{6,})")


def name_of(iteration: int) -> str:
    """The name of a checkpoint's directory."""
    return f"iteration_{iteration:06d}"


def iteration_of(path: Path) -> int:
    """The iteration by the directory's name; -1 where it is not the name of a checkpoint."""
    match = NAME.fullmatch(path.name)
    return -1 if match is None else int(match[1])


def checkpoints_in(directory: Path) -> list[Path]:
    """What has the name of a checkpoint, good or bad, the newest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if iteration_of(path) >= 0]
    return sorted(found, key=iteration_of, reverse=True)
