"""`megatron-rl show`: one self-contained HTML page of what a run's policy said.

megatron-rl show RUN [--output FILE.html]

RUN is a run's directory or its rollouts.jsonl; training writes that with metrics.rollouts_every=N.
The page needs no network, and nothing that a model wrote is ever read as markup or run.
"""

import argparse
import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megatron_rl.errors import InputError
from megatron_rl.metrics.writers import ROLLOUTS_NAME, read_jsonl

HERE = Path(__file__).parent
# Escaped as JSON allows, so that no text can end the script element that holds the data.
ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
FIELDS = {"iteration", "prompt", "answer", "source", "group", "responses"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory or rollouts.jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="default: beside the run")


def run(options: argparse.Namespace) -> int:
    source = find_rollouts(options.run)
    output = options.output or source.with_suffix(".html")
    groups = read_groups(source)
    write(output, build_page(source.parent.resolve().name, groups))
    print(f"{len(groups)} prompts in {output}")
    return 0


def find_rollouts(run: Path) -> Path:
    source = run / ROLLOUTS_NAME if run.is_dir() else run
    if not source.is_file():
        raise InputError(
            f"{run}: no file {source}. Train with metrics.rollouts_every=N, which writes it"
        )
    return source


def read_groups(source: Path) -> list[dict[str, Any]]:
    groups = read_jsonl(source)
    if not groups:
        raise InputError(f"{source}: holds no rollouts yet")
    for number, group in enumerate(groups, start=1):
        if missing := FIELDS - group.keys():
            raise InputError(
                f"{source}, line {number}: has no {', '.join(sorted(missing))}. "
                f"Give a {ROLLOUTS_NAME} that training wrote"
            )
    return groups


def build_page(run: str, groups: list[dict[str, Any]]) -> str:
    """The page: template, script and data in one text."""
    script = (HERE / "show.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (HERE / "show.html").read_text(encoding="utf-8")
    # Data last: a mark in it is text, and must not be filled in.
    for mark, text in (
        ("@SCRIPT_HASH@", f"sha256-{digest}"),
        ("@SCRIPT@", script),
        ("@DATA@", embedded({"run": run, "groups": groups})),
    ):
        page = page.replace(mark, text, 1)
    return page


def embedded(value: object) -> str:
    """JSON in ASCII that no HTML parser takes for anything but text."""
    return "".join(ESCAPES.get(character, character) for character in json.dumps(value))


def write(output: Path, page: str) -> None:
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
