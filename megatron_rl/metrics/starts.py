"""What each start of a run was: its resolved recipe and its environment, none ever overwritten.

starts/000/config.yaml    the resolved recipe of the first start, starts/001/ of the next, ...
starts/000/environment.json
config.yaml               a copy of the newest start's; so is environment.json
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

STARTS = "starts"
CONFIG, ENVIRONMENT = "config.yaml", "environment.json"


def write_start(output: Path, recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> Path:
    """Write both files of this start, and return its directory; called on global rank 0 only."""
    starts = output / STARTS
    starts.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in starts.iterdir() if path.name.isdecimal()]
    if not numbers and (output / CONFIG).exists():
        numbers = [_adopt(output, starts / "000")]
    start = starts / f"{max(numbers, default=-1) + 1:03d}"
    start.mkdir()
    (start / CONFIG).write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    (start / ENVIRONMENT).write_text(json.dumps(environment, indent=2) + "\n")
    for name in (CONFIG, ENVIRONMENT):
        copy = output / f"{name}.new"
        shutil.copyfile(start / name, copy)
        os.replace(copy, output / name)
    return start


def date_in(directory: Path) -> str | None:
    """The date in the prompts of the run that this is the directory of; None: it has none."""
    try:
        recipe = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    prompts = recipe.get("prompts") if isinstance(recipe, dict) and "run" in recipe else None
    date = prompts.get("date") if isinstance(prompts, dict) else None
    return date if isinstance(date, str) else None


def _adopt(output: Path, start: Path) -> int:
    """Keep the files of a run whose starts an older version did not number."""
    start.mkdir()
    for name in (CONFIG, ENVIRONMENT):
        if (output / name).exists():
            shutil.copyfile(output / name, start / name)
    return int(start.name)
