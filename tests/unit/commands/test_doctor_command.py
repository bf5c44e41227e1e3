"""The command around the checks: its table, its exit code, what a recipe changes."""

import pytest

from megatron_rl.commands import doctor
from megatron_rl.commands.main import main
from megatron_rl.doctor.check import Check, failed, not_there, ok, warning
from megatron_rl.doctor.report import all_checks, table

OUTCOMES = {
    "fine": ok("there"),
    "weak": warning("little", "more"),
    "optional": not_there("another is used"),
    "bad": failed("nothing"),
}


@pytest.fixture
def machine(monkeypatch):
    """Sets the outcomes of all checks; gives back how they were asked for."""
    asked = []

    def set_to(*names):
        def checks(directory, *, has_vllm):
            asked.append((directory, has_vllm))
            return [
                Check(name=name, look=lambda name=name: OUTCOMES[name], remedy=f"mend {name}")
                for name in names
            ]

        monkeypatch.setattr(doctor, "all_checks", checks)
        return asked

    return set_to


def test_warnings_are_no_failures(machine, capsys):
    machine("fine", "weak", "optional")
    assert main(["doctor"]) == 0
    *rows, empty, last = capsys.readouterr().out.splitlines()
    assert rows == [
        "fine      ok         there",
        "weak      warning    little",
        "                     -> more",
        "optional  not there  another is used",
    ]
    assert empty == ""
    assert last == "3 checks in 0 s: nothing failed, 1 warning"


def test_a_failure_has_its_remedy_and_an_exit_code(machine, capsys, tmp_path, monkeypatch):
    machine("bad", "fine")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    assert main(["doctor"]) == 2
    rows = capsys.readouterr().out.splitlines()
    assert rows[:2] == ["bad   failed  nothing", "              -> mend bad"]
    assert "2 checks in 0 s: 1 failed" in (tmp_path / "error").read_text()


def test_a_long_finding_is_wrapped_and_a_remedy_is_not():
    words, command = "word " * 60, f"command {'x' * 200}"
    lines = list(table([failed(words, command)]))
    assert max(map(len, lines[:-1])) <= 98
    assert lines[-1].strip() == f"-> {command}"


def test_a_recipe_says_where_it_writes_and_whether_it_samples(machine, tmp_path):
    asked = machine("fine")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run: {{output_dir: {tmp_path}/out, num_iterations: 1}}\n"
        "model: {path: nowhere}\nprompts: {path: nowhere}\nalgorithm: {preset: grpo}\n"
        "rollout: {engine: vllm}\n"
    )
    assert main(["doctor", str(recipe)]) == 0
    assert main(["doctor", str(recipe), "algorithm.preset=sft", "run.output_dir=other"]) == 0
    assert main(["doctor", str(recipe), "rollout.engine=megatron"]) == 0
    assert [(str(directory), engine) for directory, engine in asked] == [
        (f"{tmp_path}/out", True),
        ("other", False),
        (f"{tmp_path}/out", False),
    ]
    assert main(["doctor", str(recipe), "run.num_iterations=0"]) == 2


def test_an_override_without_a_recipe_is_refused(machine, capsys):
    machine("fine")
    assert main(["doctor", "run.seed=1"]) == 2
    assert "override 'run.seed=1': name a recipe before it" in capsys.readouterr().err


def test_other_ranks_of_a_machine_leave_it_to_the_first(machine, monkeypatch, capsys):
    asked = machine("bad")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["doctor"]) == 0
    assert (asked, capsys.readouterr().out) == ([], "")


def test_every_check_is_asked_for_once(tmp_path):
    names = [check.name for check in all_checks(tmp_path, has_vllm=True)]
    assert len(set(names)) == len(names)
    without = [check.name for check in all_checks(tmp_path, has_vllm=False)]
    assert [name for name in names if name not in without] == ["vLLM"]
    assert all(check.remedy for check in all_checks(tmp_path, has_vllm=True))
