"""Makes .venv with everything that a run, its tests and its checks need; `make install` calls it.

The one file that decides what is installed where: which Python may run us, CPU or CUDA, which
build of torch. Standard library only, and without new syntax, so that an unsupported Python gets an
answer instead of a syntax error. A repeated call finds its stamp in .venv and does nothing.

MEGATRON_RL_DEVICE=cpu or cuda overrides what is detected. Everything pip says is in
.venv/install.log.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "megatron_rl_install.json"
LOG = VENV / "install.log"

SUPPORTED_PYTHONS = ((3, 11), (3, 12))
DEVICE_VARIABLE = "MEGATRON_RL_DEVICE"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

TIMEOUT_OF_PROBE_S = 300
SECONDS_BETWEEN_SIGNS_OF_LIFE = 30
LINES_SHOWN_ON_FAILURE = 20


class InstallError(RuntimeError):
    """What went wrong and what to do about it, for the person at the terminal."""


class Step(NamedTuple):
    """One call of `pip install`."""

    title: str
    arguments: tuple[str, ...]
    consequence_of_failure: str = ""  # empty: the installation stops


class Stamp(NamedTuple):
    """What a finished .venv was made from."""

    python: str  # "3.12"
    device: str
    requirements: str  # hash of requirements/
    package: str  # hash of what the editable installation is built from


# Decisions. Nothing below this line up to "Actions" touches the machine.


def python_problem(version: Sequence[int]) -> str | None:
    """Why this Python cannot run us; None where it can."""
    if tuple(version[:2]) in SUPPORTED_PYTHONS:
        return None
    found = ".".join(str(part) for part in version[:3])
    return (
        f"Python {found} is not supported: must be 3.11 or 3.12, which torch, vLLM and "
        "Megatron-Core all have releases for. Name one: make install PYTHON=python3.12"
    )


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
    pins = [line.strip() for line in requirements.splitlines() if line.startswith("torch==")]
    if len(pins) != 1:
        raise InstallError(f"requirements must pin torch once, found {pins}")
    return pins[0]


def plan_cpu(torch: str, configured_torch_is_cpu: bool) -> list[Step]:
    """The steps for a machine without a GPU; the list of packages is closed, hence --no-deps."""
    if configured_torch_is_cpu:
        first = Step(torch, ("--no-deps", torch))
    else:
        first = Step(
            f"{torch} from PyTorch's CPU index",
            ("--no-deps", "--index-url", PYTORCH_CPU_INDEX, torch),
        )
    files = ("-r", "requirements/cpu.txt", "-r", "requirements/dev.txt")
    return [first, Step("packages of requirements/cpu.txt and dev.txt", ("--no-deps", *files))]


def plan_cuda(torch: str) -> list[Step]:
    """The steps for a machine with NVIDIA GPUs."""
    return [
        Step(torch, (torch,)),  # first: Transformer Engine is compiled against it
        Step(
            "packages of requirements/cuda.txt and dev.txt",
            ("-r", "requirements/cuda.txt", "-r", "requirements/dev.txt"),
        ),
        Step(
            "Transformer Engine (compiles for some minutes)",
            ("--no-build-isolation", "-r", "requirements/cuda-compiled.txt"),
            consequence_of_failure=(
                "the policy will use Megatron-Core's plain layers, which are slower"
            ),
        ),
    ]


PACKAGE_STEP = Step(
    "megatron_rl itself, editable", ("--no-deps", "--no-build-isolation", "-e", ".")
)


def work_left(wanted: Stamp, found: Stamp | None) -> str:
    """What .venv lacks: "nothing", "package", "requirements" or, to be made anew, "venv"."""
    if found is None or (found.python, found.device) != (wanted.python, wanted.device):
        return "venv"
    if found.requirements != wanted.requirements:
        return "requirements"
    return "package" if found.package != wanted.package else "nothing"


# Actions.


def main() -> None:
    problem = python_problem(sys.version_info)
    if problem:
        raise InstallError(problem)
    found = read_stamp()
    device = choose_device(
        os.environ.get(DEVICE_VARIABLE), found.device if found else None, has_nvidia_gpu()
    )
    wanted = Stamp(
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        device=device,
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
    print(f"Installing into .venv for {device}; all of pip's output is in {LOG.relative_to(ROOT)}")
    if work == "venv":
        make_venv(keep_if_unfinished=found is None, python=wanted.python)
    STAMP.unlink(missing_ok=True)  # an installation that stops halfway must not look finished
    steps = [PACKAGE_STEP]
    if work != "package":
        steps = plan(device) + steps
    for number, step in enumerate(steps, start=1):
        run_step(step, f"[{number}/{len(steps)}]")
    check_imports(device)
    STAMP.write_text(json.dumps(wanted._asdict()))
    print(f"Installed in {time.monotonic() - start:.0f} s. Next: make quickstart, or make test")


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def read_stamp() -> Stamp | None:
    try:
        return Stamp(**json.loads(STAMP.read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None  # no finished installation of this version of the file


def hash_of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def make_venv(keep_if_unfinished: bool, python: str) -> None:
    """An empty .venv, or, after an installation that stopped halfway, the one that is there."""
    if VENV.exists() and not (VENV / "pyvenv.cfg").exists():
        raise InstallError(f"{VENV} is there but is no virtual environment. Move it away")
    is_same_python = (VENV / "lib" / f"python{python}").is_dir()
    if keep_if_unfinished and is_same_python and VENV_PYTHON.exists():
        return
    if Path(sys.prefix).resolve() == VENV.resolve():
        raise InstallError(
            ".venv must be made anew, which its own Python cannot do. "
            "Name another: make install PYTHON=python3"
        )
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise InstallError(
            f"{sys.executable} -m venv failed:\n{made.stdout.strip()}\n"
            "On Debian and Ubuntu the package python3-venv is what is missing"
        )


def plan(device: str) -> list[Step]:
    requirements = (ROOT / "requirements" / f"{device}.txt").read_text()
    torch = torch_requirement(requirements)
    if device == "cuda":
        return plan_cuda(torch)
    return plan_cpu(torch, configured_torch_is_cpu(torch))


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
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
        "did not give one either. Set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to where one is"
    )


def check_imports(device: str) -> None:
    """A wrong build of torch installs without a word, so look at the result."""
    code = "import torch, megatron.core, megatron_rl; print(torch.version.cuda or 'cpu')"
    check = subprocess.run(
        [str(VENV_PYTHON), "-W", "ignore", "-c", code],
        cwd=VENV,
        capture_output=True,
        text=True,
        check=False,
    )
    if check.returncode != 0:
        raise InstallError(f"The installed packages do not import:\n{check.stderr.strip()}")
    build = check.stdout.split()[-1]
    if (build == "cpu") != (device == "cpu"):
        raise InstallError(
            f"torch is a build for {build} where {device} was asked for. Remove .venv, check pip's "
            f"configured sources, or set {DEVICE_VARIABLE}"
        )


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit(f"error: {error}")
