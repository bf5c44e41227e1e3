"""What checkpoints say of themselves, before anything is built.

That is their state, and in it the version of Megatron-Core that wrote them: an older one cannot
resume from them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.names import STATE, checkpoints_in
from megatron_rl.errors import InputError
from megatron_rl.megatron import faults

WRITTEN_BY = "megatron_core"
"""The entry of STATE with the version."""

BEFORE_THE_ENTRY = faults.V0_16_1
"""The only version that wrote checkpoints without it."""


def refuse_newer(directory: Path) -> None:
    """Check the checkpoints of a run before anything is built.

    Raises:
        InputError: a newer version of Megatron-Core than is installed wrote one of them.
    """
    installed = faults.installed_version()
    for checkpoint, state in saved_states(directory):
        version = str(state.get(WRITTEN_BY, BEFORE_THE_ENTRY))
        if faults.release(version) > faults.release(installed):
            raise InputError(
                f"{checkpoint}: Megatron-Core {version} wrote this checkpoint, and {installed} is "
                f"installed: an older one cannot read the state of its optimizer. Go on where "
                f"megatron-core=={version} is installed, or start another run from the weights "
                f"alone, here as well: run.output_dir=ANOTHER_DIRECTORY model.path={checkpoint}"
            )


def saved_states(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Checkpoints of a run with what their state says, the newest first, if it can be read."""
    for path in checkpoints_in(directory):
        try:
            state = json.loads((path / STATE).read_text())
        except (OSError, ValueError):
            continue  # a resume rejects it, and says why
        if isinstance(state, dict):
            yield path, state
