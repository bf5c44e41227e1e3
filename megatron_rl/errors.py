"""Errors that a user can mend, with one form for every message; exit codes."""

import contextlib
import json
import os
import time
from pathlib import Path

FAILED = 2
"""The exit code where recipe, data, model, files or arguments are at fault."""

BROKEN = 1
"""The exit code of a fault of the program, and of a run that must not go on."""

ASKED_TO_STOP = 143
"""Where ranks write how they ended: they were asked to stop, and saved. As a shell says it of
SIGTERM."""

END_FILE = "MEGATRON_RL_END_FILE"
"""The environment variable that names the file for note_end."""


class ConfigError(ValueError):
    """One setting that cannot work: field, value, rule, way out."""

    def __init__(self, field: str, value: object, rule: str, way_out: str) -> None:
        super().__init__(f"{field}={value!r}: {rule}. {way_out}")


class ConfigErrors(ValueError):
    """Every problem of a recipe at once, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        noun = "problem" if len(problems) == 1 else "problems"
        super().__init__(f"{len(problems)} {noun} in the configuration:\n{lines}")


class InputError(ValueError):
    """Data, a model or an environment that cannot be used: where, value, rule, way out."""


class RunError(RuntimeError):
    """A run that must not go on: wrong weights in the engine, non-finite loss, failing rewards."""


class NonFiniteError(RunError):
    """The loss or the gradient of an update is not finite; raised on all ranks."""


def note_end(code: int) -> None:
    """Have the script that started torchrun know how the run ended; torchrun itself says 0 or 1.

    The first of a node's ranks to end counts.
    """
    path = os.environ.get(END_FILE)
    if path:
        with contextlib.suppress(OSError), open(path, "x") as file:
            file.write(f"{code}\n")


def tell_torchrun(message: str) -> None:
    """Have torchrun's summary, which comes last, give the reason instead of an exit code."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        now = str(int(time.time()))
        content = {"message": {"message": message, "extraInfo": {"timestamp": now}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(content))
