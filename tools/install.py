"""Makes .venv with everything that a run, its tests and its checks need; `make install` calls it.

    python3 tools/install.py [PYTHON]

The one file that decides what is installed where: which Python runs us, CPU or CUDA, which build of
torch. PYTHON is the Python that .venv is made with, as a version (3.11) or a program; without it a
finished .venv keeps its own, and a new one gets the first of SUPPORTED_PYTHONS. Versions are looked
for on PATH and among pyenv's. Standard library only, and without new syntax, since any python3 may
start it. A repeated call finds its stamp in .venv and does nothing.

MEGATRON_RL_DEVICE=cpu or cuda overrides what is detected. MEGATRON_RL_TORCH_BUILD=any lets a
machine without a GPU take the CUDA build of torch where no CPU build is to be had.
MEGATRON_RL_VENV=DIR is made in place of .venv. Everything pip says is in .venv/install.log.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / os.environ.get("MEGATRON_RL_VENV", ".venv")
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "megatron_rl_install.json"
LOG = VENV / "install.log"

SUPPORTED_PYTHONS = ("3.12", "3.13", "3.11")  # in this order; 3.11 has an older Megatron-Core
DEVICE_VARIABLE = "MEGATRON_RL_DEVICE"
TORCH_VARIABLE = "MEGATRON_RL_TORCH_BUILD"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

NATIVE_WARNING = "megatron_rl: WARNING: "  # as setup.py writes it

TIMEOUT_OF_PYTHON_S = 60
TIMEOUT_OF_PROBE_S = 300
SECONDS_BETWEEN_SIGNS_OF_LIFE = 30
LINES_SHOWN_ON_FAILURE = 20


class InstallError(RuntimeError):
    """What went wrong and what to do about it, for the person at the terminal."""


class Step(NamedTuple):
    """One call of `pip install`."""

    title: str
    arguments: tuple[str, ...]
    consequence_of_failure: str = ""  # empty: the installation stops, or goes on with `otherwise`
    otherwise: Step | None = None
    environment: tuple[tuple[str, str], ...] = ()


class Stamp(NamedTuple):
    """What a finished .venv was made from."""

    python: str  # "3.12"
    device: str
    torch: str  # which build may be there: "cpu", "cuda" or "any"
    requirements: str  # hash of requirements/
    package: str  # hash of what the editable installation is built from


# Decisions. Nothing below this line up to "Actions" touches the machine.


def python_problem(name: str, version: str | None) -> str | None:
    """Why the Python of that name cannot run us; None where it can."""
    if version in SUPPORTED_PYTHONS:
        return None
    found = f"is Python {version}" if version else "cannot be run, or has no venv and ensurepip"
    return (
        f"PYTHON={name} {found}: must be {pythons()}, which torch, vLLM and Megatron-Core all have "
        "releases for. Name another, or none to let one be found: make install"
    )


def pythons() -> str:
    """The supported Pythons in a sentence."""
    *first, last = sorted(SUPPORTED_PYTHONS)
    return f"{', '.join(first)} or {last}"


def choose_device(requested: str | None, installed: str | None, has_nvidia_gpu: bool) -> str:
    """Which device to install for: "cpu" or "cuda".

    A request wins; then what .venv was made for, since a login node without a GPU may share it;
    then what the machine has.
    """
    if requested:
        if requested not in ("cpu", "cuda"):
            raise InstallError(
                f"{DEVICE_VARIABLE}={requested!r}: must be cpu or cuda. Unset it to let the "
                "presence of nvidia-smi decide"
            )
        return requested
    return installed or ("cuda" if has_nvidia_gpu else "cpu")


def choose_torch(requested: str | None, device: str, found: Stamp | None) -> str:
    """Which build of torch may be installed: "cpu", "cuda" or "any" of the two.

    A request wins, then what .venv was made for; else the build is the device's.
    """
    if not requested:
        return found.torch if found and found.device == device else device
    if device == "cuda" or requested not in ("cpu", "any"):
        raise InstallError(
            f"{TORCH_VARIABLE}={requested!r}: must be cpu or any, and is for machines without a "
            f"GPU; this one is installed for {device}. Unset it"
        )
    return requested


def brings_cuda(report: dict[str, Any]) -> bool:
    """Whether what pip would install, by its report, is a CUDA build of torch."""
    installed = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"]
        for item in report["install"]
    }
    if installed["torch"].endswith("+cpu"):
        return False
    if "+cu" in installed["torch"]:
        return True
    return any(name.startswith(("nvidia-", "cuda-")) for name in installed)


def torch_requirement(requirements: str) -> str:
    """The line of a requirement file that pins torch, "torch==2.13.0"."""
    pins = re.findall(r"^torch==[^\s;]+", requirements, re.MULTILINE)
    if len(pins) != 1:
        raise InstallError(f"requirements must pin torch once, found {pins}")
    return pins[0]


def locked(*names: str) -> tuple[str, ...]:
    """Arguments that install the files of requirements/, which are closed, and nothing else."""
    files = [part for name in names for part in ("-r", f"requirements/{name}.txt")]
    return ("--require-hashes", "--no-deps", *files)


def plan_cpu(torch: str, build: str, configured_torch_is_cpu: bool) -> list[Step]:
    """The steps for a machine without a GPU; its build of torch is as pip's sources have it."""
    cuda_build = Step(f"the CUDA build of {torch}, which also runs on a CPU", locked("torch-cuda"))
    first = Step(torch, ("--no-deps", torch))
    if not configured_torch_is_cpu:
        first = Step(
            f"{torch} from PyTorch's CPU index",
            ("--no-deps", "--retries", "2", "--index-url", PYTORCH_CPU_INDEX, torch),
            otherwise=cuda_build if build == "any" else None,
        )
    return [first, Step("packages of requirements/cpu.txt and dev.txt", locked("cpu", "dev"))]


def plan_cuda(site_packages: Path) -> list[Step]:
    """The steps for a machine with NVIDIA GPUs."""
    # The headers that torch's libraries came with; a machine may have none, or older ones.
    headers = [str(site_packages / "nvidia" / name / "include") for name in ("cudnn", "nccl")]
    return [
        Step("packages of requirements/cuda.txt and dev.txt", locked("cuda", "dev")),
        # It is compiled against the torch that is there by now.
        Step(
            "Transformer Engine (compiles for some minutes)",
            ("--no-build-isolation", *locked("transformer-engine")),
            consequence_of_failure=(
                "the policy will use Megatron-Core's plain layers, which are slower"
            ),
            # It would load a compiled file of its own from elsewhere, which has no hash here.
            environment=(("NVTE_PYTORCH_FORCE_BUILD", "TRUE"), ("CPATH", ":".join(headers))),
        ),
    ]


PACKAGE_STEP = Step("megatron_rl, editable", ("--no-deps", "--no-build-isolation", "-ve", "."))


def work_left(wanted: Stamp, found: Stamp | None) -> str:
    """What .venv lacks: "nothing", "package", "requirements" or, to be made anew, "venv"."""
    if found is None or (found.python, found.device, found.torch) != (
        wanted.python,
        wanted.device,
        wanted.torch,
    ):
        return "venv"
    if found.requirements != wanted.requirements:
        return "requirements"
    return "package" if found.package != wanted.package else "nothing"


def left_out(output: str) -> list[str]:
    """What setup.py's warnings in the output of a build say is missing."""
    parts = (line.partition(NATIVE_WARNING) for line in output.splitlines())
    return [reason.strip() for _, warning, reason in parts if warning]


# Actions.


def main(named_python: str | None = None) -> None:
    found = read_stamp()
    device = choose_device(
        os.environ.get(DEVICE_VARIABLE), found.device if found else None, has_nvidia_gpu()
    )
    torch = choose_torch(os.environ.get(TORCH_VARIABLE), device, found)
    python, version = python_to_use(named_python, found)
    wanted = Stamp(
        python=version,
        device=device,
        torch=torch,
        requirements=hash_of((ROOT / "requirements").glob("*.txt")),
        package=hash_of(
            [
                ROOT / "pyproject.toml",
                ROOT / "setup.py",
                *(path for path in (ROOT / "csrc").rglob("*") if path.is_file()),
            ]
        ),
    )
    work = work_left(wanted, found)
    if work == "nothing":
        return
    start = time.monotonic()
    print(f"Installing into {VENV.name} for {device}, Python {version}; pip's output is in {LOG}")
    if work == "venv":
        make_venv(keep_if_unfinished=found is None, python=python, version=version)
    STAMP.unlink(missing_ok=True)  # an installation that stops halfway must not look finished
    steps = [PACKAGE_STEP]
    if work != "package":
        steps = plan(device, torch, version) + steps
    for number, step in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}]")
    check_imports(torch)
    STAMP.write_text(json.dumps(wanted._asdict()))
    print(f"Installed in {time.monotonic() - start:.0f} s. Next: make quickstart, or make test")


def python_to_use(named: str | None, found: Stamp | None) -> tuple[str, str]:
    """(the Python that .venv is made with, its version)."""
    if named and not re.match(r"\d", named):
        version = version_of(named)
        problem = python_problem(named, version)
        if problem or not version:
            raise InstallError(problem)
        return named, version
    if named and named not in SUPPORTED_PYTHONS:
        raise InstallError(python_problem(named, named))
    if found and not named:
        return str(VENV_PYTHON), found.python
    for wanted in (named,) if named else SUPPORTED_PYTHONS:
        for candidate in candidates(wanted):
            if version_of(candidate) == wanted:
                return candidate, wanted
    raise InstallError(
        f"Python {named or pythons()} is needed, with venv and ensurepip, and was found neither on "
        "PATH nor among pyenv's. Install it (on Debian and Ubuntu the packages python3 and "
        "python3-venv), or name it: make install PYTHON=/path/to/python3.12"
    )


def candidates(version: str) -> Iterator[str]:
    """Programs that may be that Python."""
    for name in (f"python{version}", "python3", "python"):
        path = shutil.which(name)
        if path:
            yield path
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    patches = [path for path in versions.glob(f"{version}.*") if re.search(r"\.\d+$", path.name)]
    for path in sorted(patches, key=lambda path: -int(path.suffix[1:])):
        yield str(path / "bin" / "python")


def version_of(python: str) -> str | None:
    """Its version, "3.12"; None where it does not run or cannot make an environment."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        asked = subprocess.run(
            [python, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_OF_PYTHON_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def read_stamp() -> Stamp | None:
    try:
        found = json.loads(STAMP.read_text())
        return Stamp(**{"torch": found["device"], **found})  # older ones have no choice of torch
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None  # no finished installation of this version of the file


def hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def make_venv(keep_if_unfinished: bool, python: str, version: str) -> None:
    """An empty .venv, or, after an installation that stopped halfway, the one that is there."""
    if VENV.exists() and not (VENV / "pyvenv.cfg").exists():
        raise InstallError(f"{VENV} is there but is no virtual environment. Move it away")
    is_same_python = (VENV / "lib" / f"python{version}").is_dir()
    if keep_if_unfinished and is_same_python and VENV_PYTHON.exists():
        return
    if Path(python) == VENV_PYTHON:  # which the next call removes
        asked = "import sys; print(sys._base_executable)"
        python = subprocess.check_output([python, "-c", asked], text=True).strip()
    made = subprocess.run(
        [python, "-m", "venv", "--clear", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise InstallError(f"{python} -m venv failed:\n{made.stdout.strip()}")


def plan(device: str, torch_build: str, python: str) -> list[Step]:
    if device == "cuda":
        return plan_cuda(VENV / "lib" / f"python{python}" / "site-packages")
    torch = torch_requirement((ROOT / "requirements" / "torch-cuda.txt").read_text())
    return plan_cpu(torch, torch_build, configured_torch_is_cpu(torch))


def configured_torch_is_cpu(torch: str) -> bool:
    """Whether pip as configured on this machine would install a CPU build; installs nothing."""
    print("Looking for a CPU build of torch in pip's configured sources ...", flush=True)
    report = VENV / "torch_report.json"
    command = pip("install", "--dry-run", "--ignore-installed", "--report", str(report), torch)
    try:
        probe = subprocess.run(
            command, capture_output=True, check=False, timeout=TIMEOUT_OF_PROBE_S
        )
    except subprocess.TimeoutExpired:
        return False
    if probe.returncode != 0:  # no torch for this Python there
        return False
    is_cpu = not brings_cuda(json.loads(report.read_text()))
    report.unlink()
    return is_cpu


def pip(*arguments: str) -> list[str]:
    return [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def run_step(step: Step, position: str) -> None:
    print(f"{position} {step.title} ...", flush=True)
    start = last_sign = time.monotonic()
    tail: deque[str] = deque(maxlen=LINES_SHOWN_ON_FAILURE)
    command = pip("install", "--progress-bar", "off", *step.arguments)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **dict(step.environment)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with LOG.open("a", encoding="utf-8") as log, process:
        assert process.stdout is not None
        log.write("$ " + " ".join(command) + "\n")
        for line in process.stdout:
            log.write(line)
            tail.append(line.rstrip())
            if time.monotonic() - last_sign > SECONDS_BETWEEN_SIGNS_OF_LIFE:
                last_sign = time.monotonic()
                print(f"      {last_sign - start:.0f} s: {line.strip()[:80]}", flush=True)
    seconds = time.monotonic() - start
    if process.returncode == 0:
        print(f"      done in {seconds:.0f} s", flush=True)
        return
    if step.otherwise:
        print(f"      not to be had ({seconds:.0f} s); instead:", flush=True)
        run_step(step.otherwise, position)
        return
    last_lines = "\n".join(f"  | {line}" for line in tail)
    if step.consequence_of_failure:
        print(f"{last_lines}\n      not installed: {step.consequence_of_failure}", flush=True)
        return
    raise InstallError(
        f"pip could not install {step.title}. Its last lines:\n{last_lines}{hint(step)}"
    )


def hint(step: Step) -> str:
    if PYTORCH_CPU_INDEX not in step.arguments:
        return f"\nThe whole output is in {LOG}"
    return (
        f"\nNo CPU build of torch was found in pip's configured sources, and {PYTORCH_CPU_INDEX} "
        "did not give one either. Set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to where one is, or "
        f"take the CUDA build (3 GB), which also runs on a CPU: {TORCH_VARIABLE}=any make install"
    )


def check_imports(torch_build: str) -> None:
    """A wrong build of torch, and parts left out, install without a word: look at the result."""
    code = (
        "import torch, megatron.core; from megatron_rl.ops import native; "
        "print(torch.version.cuda or 'cpu', ', '.join(native.devices()) or 'none: definitions run')"
    )
    check = subprocess.run(
        [str(VENV_PYTHON), "-W", "ignore", "-c", code],
        cwd=VENV,
        capture_output=True,
        text=True,
        check=False,
    )
    if check.returncode != 0:
        raise InstallError(f"The installed packages do not import:\n{check.stderr.strip()}")
    build, devices = check.stdout.strip().splitlines()[-1].split(maxsplit=1)
    if torch_build != "any" and (build == "cpu") != (torch_build == "cpu"):
        raise InstallError(
            f"torch is a build for {build} where one for {torch_build} was asked for. Remove "
            f"{VENV}, check pip's configured sources, or set {DEVICE_VARIABLE} or {TORCH_VARIABLE}"
        )
    print(f"Native ops: {devices}")
    for reason in left_out(LOG.read_text(encoding="utf-8").rpartition("\n$ ")[2]):
        print(f"WARNING: {reason} (the compiler's output is in {LOG})")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except InstallError as error:
        sys.exit(f"error: {error}")
