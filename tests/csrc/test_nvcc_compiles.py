"""What can be known of the kernels without a GPU: they compile for every architecture without a
warning, do not spill, and for sm_90 use no more registers than recorded.

After a change that is meant to use more: `python tests/csrc/test_nvcc_compiles.py` records anew.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("registers_sm_90.json")
SOURCES = sorted(ROOT.glob("csrc/*/*_launch.cu"))
NVCC = shutil.which("nvcc")

ARCHS = ("80", "90", "100")
EXHAUSTIVE = {"100"}  # of what the oldest and the recorded one show already
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
FLAGS += ["-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v,-warn-spills"]

ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def compile_all(arch, folder):
    """{kernel: (registers, bytes of stack and spills)}; raises what nvcc says."""
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda source: compile_one(source, arch, folder), SOURCES))
    return {kernel: usage for report in reports for kernel, usage in report.items()}


def compile_one(source, arch, folder):
    target = Path(folder, f"{source.stem}_{arch}.o")
    done = subprocess.run(
        [NVCC, *FLAGS, f"-arch=sm_{arch}", "-c", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{source.relative_to(ROOT)}:\n{done.stdout}{done.stderr}"
    usage, kernel, spilled = {}, "", 0
    for line in (done.stdout + done.stderr).splitlines():
        if found := ENTRY.search(line):
            kernel = readable(found[1])
        elif found := SPILLS.search(line):
            spilled = sum(int(number) for number in found.groups())
        elif found := REGISTERS.search(line):
            usage[kernel] = (int(found[1]), spilled)
    return usage


def readable(mangled):
    """The kernel's name without its argument types."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = name.strip().removeprefix("void ").replace("megatron_rl::", "")
    return name.replace("(anonymous namespace)::", "").partition("(")[0]


def nvcc_release():
    told = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", told)[1]


@pytest.fixture(scope="module")
def usage_on(tmp_path_factory):
    """Architecture -> what compile_all tells; each is compiled once."""
    if NVCC is None:
        pytest.skip("no nvcc on this machine")
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt on this machine")
    folder = tmp_path_factory.mktemp("kernels")
    return functools.cache(lambda arch: compile_all(arch, folder))


@pytest.fixture
def usage(usage_on):
    return usage_on("90")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=pytest.mark.exhaustive if a in EXHAUSTIVE else ()) for a in ARCHS],
)
def test_every_kernel_compiles_without_warnings_and_spills(usage_on, arch):
    told = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    if f"compute_{arch}" not in told.stdout.split():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    spilling = {kernel: spilled for kernel, (_, spilled) in usage_on(arch).items() if spilled}
    assert not spilling


@pytest.mark.slow
def test_no_kernel_uses_more_registers_than_recorded(usage):
    record = json.loads(RECORD.read_text())
    if record["nvcc"] != nvcc_release():
        pytest.skip(f"recorded with nvcc {record['nvcc']}, here is {nvcc_release()}")
    recorded = record["registers"]
    assert set(usage) == set(recorded)
    grown = {
        kernel: f"{registers}, recorded {recorded[kernel]}"
        for kernel, (registers, _) in usage.items()
        if registers > recorded[kernel]
    }
    assert not grown


@pytest.mark.slow
def test_kernels_of_512_threads_fit_a_multiprocessor_twice(usage):
    # 65,536 registers for 2 x 512 threads: what __launch_bounds__ promises the scheduler
    large = {
        kernel: registers
        for kernel, (registers, _) in usage.items()
        if "cluster" in kernel or "onepass" in kernel
        if registers > 64
    }
    assert not large


def test_kernels_and_launchers_need_no_torch():
    device_files = [*SOURCES, *ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("csrc/*/*_launch.h")]
    assert not [path.name for path in device_files if "torch" in path.read_text()]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        usages = compile_all("90", scratch)
    measured = {kernel: registers for kernel, (registers, _) in usages.items()}
    record = {"nvcc": nvcc_release(), "registers": dict(sorted(measured.items()))}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"{len(measured)} kernels recorded in {RECORD.name}\n")
