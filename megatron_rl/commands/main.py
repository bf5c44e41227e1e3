"""The command `megatron-rl`: learning from verifiable rewards, and what comes before and after it.

Exit codes of every command:
  0    done; verify: the two are the same
  1    verify: they are not the same. Every command: a fault of the program, with its traceback;
       train: a run that must not go on, told as `megatron-rl: error: ...`
  2    a problem in recipe, data, model, files or arguments, told the same way; train: all
       iterations are done, and none took an optimizer step; doctor: a check failed
  75   train, evaluate: a rank stood still; the message names it
  130  stopped by Ctrl-C
Under torchrun these are the codes of the ranks, and torchrun's own is 0, or 1 for any of them.
"""

import argparse
import errno
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn, Protocol, cast

from megatron_rl.errors import FAILED, ConfigErrors, InputError, note_end, tell_torchrun
from megatron_rl.parallel.place import job_rank
from megatron_rl.references import hidden

STOPPED = 130  # as a shell says it
DENIED = (  # what only another path, other rights or more room can mend
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
)
COMMANDS = {  # name: the file of this room that has it, and what it does
    "train": ("recipe", "train a policy; start it with torchrun for more than one rank"),
    "evaluate": ("recipe", "measure model.path on the recipe's benchmarks"),
    "doctor": ("doctor", "look at this machine: what works, what does not, and the way out"),
    "plan": ("recipe", "print layout, memory, passes, bytes and the first prompt; runs nothing"),
    "grade": ("grade", "verify the responses of a file; needs no model"),
    "convert": ("convert", "convert a checkpoint, Hugging Face to Megatron-Core or back"),
    "verify": ("verify", "compare two checkpoints of either kind: every tensor, then the logits"),
    "prepare": ("prepare", "make a prompt file out of published problems or your own files"),
    "plot": ("plot", "draw the curves of one or more runs"),
    "show": ("show", "make one HTML page of what a run's policy said"),
    "settings": ("settings", "print settings with their types, defaults and meanings"),
}
GOES_ON = {  # what the same command does after Ctrl-C; the others start over
    "train": "the same command goes on from the newest checkpoint",
    "convert": "the same command goes on from here",
}


WAIT_FOR_FIRST_S = 2.0
"""How long the other ranks of a node leave it to the first one to tell torchrun what is wrong."""


class Command(Protocol):
    """A file of this room: the options of a command, and what it does with them."""

    def add_options(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int:
        """Returns the exit code."""
        ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, that of this process by default; returns the exit code.

    Only the file of the command that is named is imported, and that imports what is slow where it
    is used: help and messages about options and recipes come at once.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, command = _parse(given)
    try:
        return command.run(options)
    except (ConfigErrors, InputError) as error:
        return _failed(error)
    except KeyboardInterrupt:
        hint = GOES_ON.get(options.command)
        say(f"stopped; {hint}" if hint else "stopped")
        return STOPPED
    except BrokenPipeError:
        # Who reads, `head` for example, has enough. Nothing is left to flush at the end of Python.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DENIED:
            raise
        return _failed(error)


def _failed(error: Exception) -> int:
    say(f"error: {error}")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # All ranks find the same problem, and torchrun ends this one when the first has told it.
        time.sleep(WAIT_FOR_FIRST_S)
    tell_torchrun(hidden(str(error)))
    note_end(FAILED)
    return FAILED


def say(message: str) -> None:
    """Write one message to stderr, on the first rank: every rank finds the same problem."""
    if job_rank() == 0:
        sys.stderr.write(hidden(f"megatron-rl: {message}\n"))
        sys.stderr.flush()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments as everything else is said."""

    def error(self, message: str) -> NoReturn:
        say(f"error: {message}. `{self.prog} --help` lists what there is")
        note_end(FAILED)
        sys.exit(FAILED)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, Command]:
    raw = argparse.RawDescriptionHelpFormatter
    description, _, exit_codes = __doc__.partition("\n\n")
    parser = _Parser(
        prog="megatron-rl", description=description, epilog=exit_codes, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=meaning, formatter_class=raw)
        for name, (_, meaning) in COMMANDS.items()
    }
    name = next((text for text in arguments if text in COMMANDS), None)
    if name is None:
        parser.parse_args(arguments)  # help, or an error
        parser.error("name a command")
    command = cast(Command, importlib.import_module(f"megatron_rl.commands.{COMMANDS[name][0]}"))
    command.add_options(parsers[name])
    options, more = parser.parse_known_args(arguments)
    # argparse gives overrides that follow an option back as unknown.
    if any(text.startswith("-") for text in more) or (more and "overrides" not in options):
        parsers[name].error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.overrides += more
    return options, command
