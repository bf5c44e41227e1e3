"""Writers of an iteration's numbers: JSON lines, TensorBoard, Weights & Biases."""

import importlib
import itertools
import json
import math
import os
import secrets
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from megatron_rl.errors import InputError
from megatron_rl.files import noticing_a_loss
from megatron_rl.metrics.config import MetricsConfig

JSONL_NAME = "metrics.jsonl"
ROLLOUTS_NAME = "rollouts.jsonl"


class MetricsWriter(Protocol):
    """Takes the numbers of one iteration after the other; lives on global rank 0 only."""

    def write(self, iteration: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Writes one JSON object per iteration, which others can read as soon as it is written.

    Example line: {"iteration": 3, "reward/mean": 0.5, "policy/grad_norm": null}; a number that is
    not finite becomes null, since JSON has no such numbers.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"iteration": iteration, **numbers}, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, iteration: int) -> None:
        """Forget the iterations that a resumed run repeats; the file is replaced in one step."""
        self._file.close()
        truncate_jsonl(self._path, iteration)
        with noticing_a_loss(self._path.parent, self._path.name):
            self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


def truncate_jsonl(path: Path, iteration: int) -> None:
    """Drop the records of later iterations from a file, which is replaced in one step.

    Raises:
        RunError: its directory is gone.
    """
    replacement = path.with_suffix(".jsonl.new")
    with noticing_a_loss(path.parent, path.name):
        kept = [record for record in read_jsonl(path) if record["iteration"] <= iteration]
        with replacement.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JsonlWriter, in file order; a last line cut by a crash is left out."""
    records = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.raw.endswith(b"\n"):
            break  # only the last line can lack its end: the process died while writing it
        if line.record is None:
            raise InputError(
                f"{path}, line {number}: {line.text!r} is not a record of a run: must be a JSON "
                "object with an iteration. Give a metrics.jsonl that training wrote"
            )
        records.append(line.record)
    return records


def damaged_end(path: Path) -> int | None:
    """The byte at which the damaged lines at the end of a file begin; None: there is no damage.

    Raises:
        InputError: a damaged line stands before good ones.
    """
    at, damage = 0, None
    for number, line in enumerate(_lines(path), start=1):
        if line.record is None:
            damage = damage or (at, number, line.text)
        elif damage is not None:
            _, first, text = damage
            raise InputError(
                f"{path}, line {first}: {text!r} is not a record of a run, and good ones follow. "
                f"Remove the line: sed -i {first}d {shlex.quote(str(path))}"
            )
        at += len(line.raw)
    return None if damage is None else damage[0]


def appended_files(config: MetricsConfig, directory: Path) -> list[Path]:
    """The files of a run to which it appends records, and which a resumed run continues."""
    asked = {JSONL_NAME: config.jsonl, ROLLOUTS_NAME: config.rollouts_every > 0}
    return [directory / name for name, is_asked in asked.items() if is_asked]


def check_appendable(path: Path, done: int | None) -> None:
    """Check a file before anything is built; done: iterations before this start, None: not known.

    Raises:
        InputError: it is no file, or damage stands before good records that the run would keep.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: it must be a file, and is none. Move it away")
    if done and path.exists():
        damaged_end(path)


def prepare_to_append(path: Path, done: int | None) -> Iterator[str]:
    """Make a file ready for this run's next record; what was done to it, in lines.

    A run that goes on has damaged lines cut off its end. A new one moves the file away. Where it is
    not known how much is done, the file is left as it is.
    """
    if done is None:
        return
    if not path.exists():
        if done:
            yield f"{path.name} is not there: it will hold nothing of iterations 1 to {done}"
        return
    if not done:
        names = (f"{path.name}.{number}" for number in itertools.count())
        kept = next(name for name in names if not path.with_name(name).exists())
        path.rename(path.with_name(kept))
        yield f"{path.name} of an earlier run, which has no checkpoint, is kept as {kept}"
        return
    begin = damaged_end(path)
    if begin is not None:
        size = path.stat().st_size
        os.truncate(path, begin)
        last = max((record["iteration"] for record in read_jsonl(path)), default="none")
        yield (
            f"{path.name}: its last {size - begin} bytes were damaged and are cut off; the last "
            f"iteration in it is {last}"
        )


@dataclass(frozen=True)
class _Line:
    raw: bytes
    record: dict[str, Any] | None  # None: damaged

    @property
    def text(self) -> str:
        return self.raw.decode(errors="replace").strip()[:80]


def _lines(path: Path) -> Iterator[_Line]:
    with path.open("rb") as file:
        for raw in file:
            yield _Line(raw, _record(raw) if raw.endswith(b"\n") else None)


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
        record["iteration"] = int(record["iteration"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return dict(record)


class TensorBoardWriter:
    """Writes scalars by iteration; events of iterations that a run repeats are purged."""

    def __init__(self, directory: Path, first_iteration: int) -> None:
        tensorboard = _import("torch.utils.tensorboard", "tensorboard", "metrics.tensorboard", True)
        self._events = tensorboard.SummaryWriter(str(directory), purge_step=first_iteration)

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, iteration)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandbWriter:
    """Writes to a run on Weights & Biases; a resumed run keeps its id, so its parts join.

    Online, wandb drops steps that it has already. Offline, each part of a run keeps all of its
    steps; those that two parts share are equal, since a resume repeats them exactly.
    """

    def __init__(
        self, config: MetricsConfig, directory: Path, run_settings: Mapping[str, Any]
    ) -> None:
        wandb = _import("wandb", "wandb", "metrics.wandb_project", config.wandb_project)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                mode=config.wandb_mode,
                dir=str(directory),
                id=_run_id(directory / "wandb_run_id"),
                name=directory.name,
                # An offline run cannot ask the server what it has.
                resume="allow" if config.wandb_mode == "online" else None,
                config=dict(run_settings),
                # Our display owns the terminal; code and details of the machine are not sent.
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )
        except wandb.errors.Error as error:
            raise InputError(
                f"metrics.wandb_mode={config.wandb_mode!r}: wandb could not start a run: {error}. "
                "Log in with `wandb login`, or set metrics.wandb_mode=offline"
            ) from error

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()


def open_writers(
    config: MetricsConfig,
    directory: Path,
    *,
    last_iteration: int | None = None,
    run_settings: Mapping[str, Any] | None = None,
) -> list[MetricsWriter]:
    """The writers that the config asks for; called on global rank 0 only.

    Args:
        directory: the run's; everything is written under it.
        last_iteration: the last one done before a resume; later records are dropped. None: this
            is a new run.
        run_settings: the resolved recipe, for trackers that show it.
    """
    writers: list[MetricsWriter] = []
    kept = -1 if last_iteration is None else last_iteration
    if config.jsonl:
        jsonl = JsonlWriter(directory / JSONL_NAME)
        jsonl.truncate_after(kept)
        writers.append(jsonl)
    if config.tensorboard:
        writers.append(TensorBoardWriter(directory / "tensorboard", first_iteration=kept + 1))
    if config.wandb_project is not None:
        writers.append(WandbWriter(config, directory, run_settings or {}))
    return writers


def _run_id(path: Path) -> str:
    """The id in this file, which is written with a new id where it is not there."""
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _import(module: str, package: str, field: str, value: object) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{field}={value!r}: needs the package {package}, which is not installed. "
            f"Run `pip install {package}`, or leave {field} unset"
        ) from error
