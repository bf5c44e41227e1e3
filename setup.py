"""Builds the package and its native part; what the package is stands in pyproject.toml.

MEGATRON_RL_CSRC decides about the native part:
  auto  (default) the CPU ops, and the CUDA ops where nvcc is found. What cannot be compiled is left
        out with a warning: the package then runs the PyTorch definitions, and a run says so.
  cpu   the CPU ops; a failure stops the installation.
  cuda  the CPU and the CUDA ops; a failure, or no nvcc, stops the installation.
  off   nothing.
MEGATRON_RL_CUDA_ARCHS names the compute capabilities, default 80;90;100 as far as nvcc knows them;
the last one also as PTX, which newer devices translate. MAX_JOBS is the number of compilers at a
time, default 2.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODES = ("auto", "cpu", "cuda", "off")
MODE = os.environ.get("MEGATRON_RL_CSRC") or "auto"
DEFAULT_CUDA_ARCHS = "80;90;100"

# Nothing is fused that does not say so: results must not depend on what a compiler thinks of.
HOST_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The oldest torch that the binary runs on.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
ISA_FLAGS = {
    "row_kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "row_kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}
OTHER_SOURCES = ("csrc/bindings.cpp", "csrc/shared_memory/meeting.cpp")


def find_torch() -> Path | None:
    """The folder of the torch of this environment, which an isolated build sees only as files."""
    spec = importlib.util.find_spec("torch")
    found = spec.submodule_search_locations if spec else None
    folders = [*(found or []), str(Path(sysconfig.get_paths()["purelib"], "torch"))]
    return next((Path(f) for f in folders if Path(f, "include/torch/csrc/stable").is_dir()), None)


def find_pybind11() -> str:
    """Its headers; pyproject.toml names it for the build."""
    pybind11 = importlib.import_module("pybind11")
    return str(pybind11.get_include())


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and Path(home, "bin/nvcc").is_file():
            return str(Path(home, "bin/nvcc"))
    return shutil.which("nvcc")


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob(pattern))


def host_sources() -> list[str]:
    """What this machine has: vectors by its processor, and memory that processes share on Linux."""
    left_out = set() if platform.machine() in ("x86_64", "AMD64") else set(ISA_FLAGS)
    if platform.system() != "Linux":
        left_out |= {Path(path).name for path in sources("shared_memory/*.cpp")}
    return [
        path
        for path in (*sources("*_op.cpp"), *sources("row_kernels_*.cpp"), *OTHER_SOURCES)
        if Path(path).name not in left_out
    ]


def cuda_arch_flags(nvcc: str) -> list[str]:
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {line.removeprefix("compute_") for line in listing.stdout.split()}
    wanted = os.environ.get("MEGATRON_RL_CUDA_ARCHS")
    archs = [a for a in (wanted or DEFAULT_CUDA_ARCHS).replace(",", ";").split(";") if a]
    if not wanted:
        archs = [arch for arch in archs if arch in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cuda_library_folders(nvcc: str) -> list[str]:
    """Asked of nvcc itself, since what is in PATH may be a script that calls it."""
    told = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    tops = [line.partition("TOP=")[2] for line in told.stderr.splitlines() if "TOP=" in line]
    home = Path(tops[0].strip() if tops else Path(nvcc).parents[1]).resolve()
    folders = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
    return [str(folder) for folder in folders if folder.is_dir()]


class BuildNative(build_ext):
    """Host files with the C++ compiler, kernels with nvcc, one library of both."""

    def build_extension(self, ext: Extension) -> None:
        # What an earlier build left would otherwise stay where this one fails.
        for folder in (Path(self.build_lib), ROOT):
            (folder / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        try:
            if ext.name == "megatron_rl._C":
                self._build_ops(ext)
            else:
                ext.include_dirs.append(find_pybind11())
                super().build_extension(ext)
        except Exception as error:
            if MODE != "auto":
                raise
            _warn(f"{ext.name} is left out, and its PyTorch or Python definitions run: {error}")

    def copy_extensions_to_source(self) -> None:
        self.extensions = [
            ext for ext in self.extensions if Path(self.get_ext_fullpath_built(ext)).is_file()
        ]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext: Extension) -> str:
        """Where build_extension puts it, which for an editable installation is copied later."""
        return str(Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name))))

    def _build_ops(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise RuntimeError("torch and its headers are not installed where this is built")
        kernels, libraries, library_dirs = self._cuda_objects()
        macros = [("MRL_WITH_CUDA", "1")] if kernels else []
        includes = [
            "-isystem",
            str(torch / "include"),
            "-I" + sysconfig.get_paths()["include"],
        ]

        def compile_one(source: str) -> str:
            flags = [*HOST_FLAGS, *ISA_FLAGS.get(Path(source).name, []), TORCH_TARGET, *includes]
            objects = self.compiler.compile(
                [source], output_dir=self.build_temp, macros=macros, extra_postargs=flags
            )
            return str(objects[0])

        with ThreadPoolExecutor(_max_jobs()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        path = self.get_ext_fullpath(ext.name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # libtorch_cpu is in memory by the time this is loaded, so no path to it is recorded.
        self.compiler.link_shared_object(
            [*objects, *kernels],
            path,
            libraries=["torch_cpu", *libraries],
            library_dirs=[str(torch / "lib"), *library_dirs],
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def _cuda_objects(self) -> tuple[list[str], list[str], list[str]]:
        """(objects, libraries, their folders); empty where only the CPU ops are built."""
        nvcc = find_nvcc() if MODE in ("auto", "cuda") else None
        if nvcc is None:
            if MODE == "cuda":
                raise RuntimeError("MEGATRON_RL_CSRC=cuda needs nvcc: set CUDA_HOME or PATH")
            return [], [], []
        out = Path(self.build_temp, "cuda")
        out.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = out / (Path(source).stem + ".o")
            flags = [*NVCC_FLAGS, *cuda_arch_flags(nvcc), "-c", source, "-o", str(target)]
            done = subprocess.run([nvcc, *flags], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"nvcc {source}:\n{done.stdout}{done.stderr}")
            return str(target)

        try:
            with ThreadPoolExecutor(_max_jobs()) as pool:
                objects = list(pool.map(compile_one, sources("*_launch.cu")))
        except Exception as error:
            if MODE == "cuda":
                raise
            _warn(f"the CUDA ops are left out, the CPU ops are built: {error}")
            return [], [], []
        return objects, ["cudart_static", "rt", "dl", "pthread"], cuda_library_folders(nvcc)


def _max_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or 2)


def _warn(message: str) -> None:
    sys.stderr.write(f"\nmegatron_rl: WARNING: {message}\n\n")
    sys.stderr.flush()


def extensions() -> list[Extension]:
    if MODE not in MODES:
        raise SystemExit(f"MEGATRON_RL_CSRC={MODE!r}: must be one of {', '.join(MODES)}")
    if MODE == "off":
        return []
    return [
        Extension(
            "megatron_rl._C",
            host_sources(),
            depends=[*sources("*.h"), *sources("*.cuh"), *sources("*.cu")],
            py_limited_api=True,
            language="c++",
        ),
        Extension(
            "megatron_rl._scheduling",
            ["csrc/scheduling/scheduling.cpp"],
            extra_compile_args=HOST_FLAGS,
            language="c++",
        ),
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    # An isolated build brings its own torch only where the environment has none.
    setup_requires=[] if MODE == "off" or find_torch() else ["torch>=2.11,<2.14"],
)
