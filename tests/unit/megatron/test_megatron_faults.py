"""The table of Megatron-Core's faults is true of the installed version, and complete."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_rl.megatron import faults, repairs
from megatron_rl.megatron.faults import ALONE, FAULTS, ON_RANKS, SUPPORTED_VERSIONS

ROOT = Path(__file__).parents[3]
LONE = sorted(fault.name for fault in FAULTS.values() if fault.probes == ALONE)
REPAIRED = sorted(fault.name for fault in FAULTS.values() if fault.action == "repaired")
ON_A_CPU = "cuda_in_its_source"


def run_probes(*arguments):
    """In a fresh process: here Megatron-Core may be repaired already."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        [sys.executable, str(ROOT / ALONE), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def shown():
    """Fault -> whether stock code shows it."""
    return run_probes(ON_A_CPU) | run_probes(*(name for name in LONE if name != ON_A_CPU))


@pytest.mark.parametrize("name", LONE)
def test_a_row_names_the_installed_version_just_where_stock_code_shows_the_fault(shown, name):
    assert shown[name] == faults.is_present(name)


def test_repaired_code_shows_none_of_the_repaired_faults():
    assert run_probes("--repaired", *REPAIRED) == dict.fromkeys(REPAIRED, False)


def test_every_row_has_one_probe_and_every_probe_a_row():
    found = [
        (node.name, probes)
        for probes in (ALONE, ON_RANKS)
        for node in ast.parse((ROOT / probes).read_text()).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert sorted(found) == sorted((fault.name, fault.probes) for fault in FAULTS.values())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_row_names_what_deals_with_it(fault):
    module, _, name = fault.by.partition(".")
    source = (ROOT / "megatron_rl" / "megatron" / f"{module}.py").read_text()
    assert name in {getattr(node, "name", None) for node in ast.parse(source).body}
    is_repair = repairs.REPAIRS.get(fault.name)
    assert (fault.action == "repaired") == (is_repair is not None)
    assert is_repair is None or fault.by == f"repairs.{is_repair.__name__}"


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_row_is_of_versions_that_are_supported(fault):
    assert fault.versions
    assert set(fault.versions) <= set(SUPPORTED_VERSIONS)


@pytest.fixture
def install(monkeypatch):
    """Pretend that a version is installed, None for none, and that UNTESTED names one."""
    monkeypatch.delenv("RANK", raising=False)

    def installed(version, asked=None):
        def version_of(name):
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", version_of)
        monkeypatch.delenv(faults.UNTESTED, raising=False)
        if asked is not None:
            monkeypatch.setenv(faults.UNTESTED, asked)
        faults.installed_version.cache_clear()

    yield installed
    faults.installed_version.cache_clear()


@pytest.mark.parametrize(("python", "version"), [((3, 11), "0.16.1"), ((3, 13), "0.19.2")])
def test_what_to_install_fits_the_python(install, monkeypatch, python, version):
    install(None)
    monkeypatch.setattr(sys, "version_info", python)
    with pytest.raises(faults.InputError, match=f"Install megatron-core=={version}$"):
        faults.installed_version()


@pytest.mark.parametrize(
    ("version", "nearest"),
    [("0.1", "0.16.1"), ("0.18.0", "0.16.1"), ("0.19.2.post1", "0.19.2"), ("0.20.0", "0.19.2")],
)
def test_a_version_that_nobody_tested_is_refused_until_it_is_asked_for(install, version, nearest):
    install(version)
    with pytest.raises(faults.InputError) as refused:
        faults.installed_version()
    asking = f"{faults.UNTESTED}={version}"
    assert f"megatron-core {version} is installed" in str(refused.value)
    assert f"{asking} to try it with the repairs of {nearest}" in str(refused.value)
    install(version, asked=version)
    with pytest.warns(UserWarning, match=f"taken to have the faults of {nearest}") as warned:
        assert [faults.installed_version(), faults.installed_version()] == [version, version]
    assert len(warned) == 1
    present = {name for name in FAULTS if faults.is_present(name)}
    assert present == {fault.name for fault in FAULTS.values() if nearest in fault.versions}
    assert f"Megatron-Core {version} " in faults.reason("clipping_in_float64")


def test_one_rank_of_a_job_warns(install, monkeypatch):
    install("0.18.0", asked="0.18.0")
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert faults.installed_version() == "0.18.0"


@pytest.mark.parametrize(
    ("installed", "asked", "way_out"),
    [
        ("0.18.0", "0.18", f"Set {faults.UNTESTED}=0.18.0"),
        ("0.18.0", "0.19.2", f"Set {faults.UNTESTED}=0.18.0"),
        ("0.19.2", "0.18.0", "Unset it: that one is tested"),
    ],
)
def test_the_variable_names_what_is_installed_and_nothing_else(install, installed, asked, way_out):
    install(installed, asked=asked)
    with pytest.raises(faults.InputError, match=f"^{faults.UNTESTED}={asked}: .*{way_out}$"):
        faults.installed_version()


def test_a_tested_version_may_be_named_and_does_not_warn(install):
    install("0.19.2", asked="0.19.2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert faults.installed_version() == "0.19.2"


def test_the_documented_table_is_this_one():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("## Faults of stock parts") :]
    documented = [line for line in table.splitlines() if line.startswith("| Megatron-Core")]
    expected = [
        f"| Megatron-Core {', '.join(fault.versions)} | {fault.wrong} | "
        f"{fault.action} in `megatron/{fault.by.partition('.')[0]}.py` |"
        for fault in FAULTS.values()
    ]
    assert documented == expected


def test_requirements_ask_for_supported_versions():
    for file in ("pyproject.toml", "requirements/cpu.txt", "requirements/cuda.txt"):
        text = (ROOT / file).read_text()
        assert any(f"megatron-core=={version}" in text for version in SUPPORTED_VERSIONS), file
