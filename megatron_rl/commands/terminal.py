"""The terminal beside the result of a command: a progress bar, and silence of libraries."""

import argparse
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LARGEST = 2**40  # of a number of anything that a command is told


def positive(text: str) -> int:
    """The number that an option has; argparse shows what is wrong with another."""
    number = int(text)
    if not 1 <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]}: must be at least 1 and at most {LARGEST}")
    return number


def add_ignored_fields(parser: argparse.ArgumentParser) -> None:
    """The option that lets fields of config.json pass that this program does not know."""
    parser.add_argument(
        "--ignore-config-field",
        action="append",
        default=[],
        metavar="NAME",
        help="a field of config.json that is not known and does not matter; may be repeated",
    )


def not_negative(text: str) -> float:
    """The real number that an option has."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number from 0 on")
    return number


@dataclass(frozen=True)
class Bar:
    """A progress bar in bytes."""

    progress: Progress
    task: TaskID

    def begin(self, total_bytes: int) -> None:
        self.progress.reset(self.task, total=total_bytes)

    def advance(self, nbytes: int) -> None:
        self.progress.advance(self.task, nbytes)


@contextmanager
def progress_bar(title: str) -> Iterator[Bar]:
    """A bar on stderr, so that stdout has the result alone."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, progress.add_task(title, total=None))


def silence_libraries() -> None:
    """Keep what libraries say while they are imported and while they load off the terminal."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", module=r"torch\.distributed\b")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
