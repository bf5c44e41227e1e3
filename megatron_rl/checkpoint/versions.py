"""Which version of Megatron-Core wrote a checkpoint; an older one cannot resume from it."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.errors import InputError
from megatron_rl.megatron import faults

CHECKPOINTS = "checkpoints"  # of a run, in its directory
STATE = "state.json"  # of a checkpoint
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
    for checkpoint, version in _written(directory):
        if faults.release(version) > faults.release(installed):
            raise InputError(
                f"{checkpoint}: Megatron-Core {version} wrote this checkpoint, and {installed} is "
                f"installed: an older one cannot read the state of its optimizer. Install "
                f"megatron-core=={version}, or start another run from its weights alone, which "
                f"every version reads: run.output_dir=ANOTHER_DIRECTORY model.path={checkpoint}"
            )


def _written(directory: Path) -> Iterator[tuple[Path, str]]:
    """Checkpoints that can be read, the newest first, with the version that wrote each."""
    for path in sorted(directory.glob(f"iteration_*/{STATE}"), reverse=True):
        try:
            state = json.loads(path.read_text())
            version = str(state.get(WRITTEN_BY, BEFORE_THE_ENTRY))
        except (OSError, ValueError, AttributeError):
            continue  # a resume rejects it, and says why
        yield path.parent, version
