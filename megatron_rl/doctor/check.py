"""A check of this machine, what comes out of it, and how checks are kept apart."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parents[1]
MAX_SHOWN_CHARS = 300
OF_TORCHRUN = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_"),
    *("GROUP_", "ROLE_", "TORCHELASTIC_"),
)
"""How variables begin that torchrun sets for its ranks."""

APART = (sys.executable, "-P", "-m", f"{__package__}.apart")
AGAIN = "megatron-rl doctor --deadline 300  # where the machine is slow or busy"
SECONDS_TO_END = 5.0  # of a process that is killed

Outcome = Literal["ok", "warning", "failed", "not there"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one check found."""

    name: str = ""  # of its check, filled in where checks are run
    outcome: Outcome
    found: str
    remedy: str = ""
    """What to type or to set; of a warning or a failure."""


def ok(found: str) -> Result:
    """It works."""
    return Result(outcome="ok", found=found)


def warning(found: str, remedy: str) -> Result:
    """A run may do with it, and may not."""
    return Result(outcome="warning", found=found, remedy=remedy)


def failed(found: str, remedy: str = "") -> Result:
    """It does not work; without a remedy the check's own one is shown."""
    return Result(outcome="failed", found=found, remedy=remedy)


def not_there(found: str, remedy: str = "") -> Result:
    """It is optional, and found says what is used in its place."""
    return Result(outcome="not there", found=found, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[], Result] | str
    """A function, or where it lies, "package.module:function": then it is imported and called in a
    process of its own, since it may crash, or hold Python's lock."""

    remedy: str
    """Where it raises, or ends its process."""

    remedy_of_delay: str = AGAIN
    """Where it gives no answer in time."""


def run_checks(checks: Sequence[Check], deadline_s: float) -> list[Result]:
    """The results of all checks, which run at the same time; each has so many seconds."""
    results: dict[str, Result] = {}
    processes: list[subprocess.Popen[bytes]] = []
    end = time.monotonic() + deadline_s

    def look(check: Check) -> None:
        try:
            if isinstance(check.look, str):
                result = _look_apart(check, check.look, end, processes)
            else:
                result = check.look()
        except Exception as error:  # of any kind: the other checks have nothing to do with it
            result = failed(told(error))
        results[check.name] = result

    # Threads that nobody waits for at the end of Python: one may hang for good.
    threads = [threading.Thread(target=look, args=(check,), daemon=True) for check in checks]
    try:
        for thread in threads:
            thread.start()
        for check, thread in zip(checks, threads, strict=True):
            # A process is ended at the deadline, and its thread then still has to say so.
            patience = SECONDS_TO_END if isinstance(check.look, str) else 0.0
            thread.join(max(0.0, end - time.monotonic()) + patience)
    finally:
        for process in [*processes]:  # after Ctrl-C
            end_group(process)
    return [_filled(results.get(check.name) or _late(check, deadline_s), check) for check in checks]


def told(error: BaseException) -> str:
    """An error on one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # the kernel may hold it
        process.wait(SECONDS_TO_END)


def _filled(result: Result, check: Check) -> Result:
    remedy = result.remedy or (check.remedy if result.outcome == "failed" else "")
    return replace(result, name=check.name, remedy=remedy)


def _late(check: Check, seconds: float, last_line: str = "") -> Result:
    return failed(f"no answer within {seconds:.0f} s{last_line}", check.remedy_of_delay)


def _look_apart(
    check: Check, function: str, end: float, processes: list[subprocess.Popen[bytes]]
) -> Result:
    with tempfile.TemporaryDirectory(prefix="megatron_rl-doctor-") as folder:
        answer, output = Path(folder, "answer.json"), Path(folder, "output.txt")
        seconds = max(0.0, end - time.monotonic())
        with output.open("wb") as said:
            process = subprocess.Popen(
                [*APART, function, str(answer), str(seconds)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(os.environ),
            )
        processes.append(process)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return _late(check, seconds, _last_line(output))
        finally:
            end_group(process)
            processes.remove(process)  # its number may become another's
        if answer.exists():
            return Result(**json.loads(answer.read_text()))
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return failed(f"its process ended with {how}{_last_line(output)}")


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """That of a lone process which finds this package, whatever the working directory holds."""
    ours = {name: value for name, value in given.items() if not name.startswith(OF_TORCHRUN)}
    path = [str(PACKAGE.parent), *filter(None, [given.get("PYTHONPATH")])]
    ours.setdefault("OMP_NUM_THREADS", "1")  # as torchrun has it: the work is small
    return ours | {"PYTHONPATH": os.pathsep.join(path)}


def _last_line(output: Path) -> str:
    lines = output.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; its last line: {last[:MAX_SHOWN_CHARS]}" if last else ""


def as_json(result: Result) -> str:
    """The form in which a process apart hands its result over."""
    return json.dumps(asdict(result))
