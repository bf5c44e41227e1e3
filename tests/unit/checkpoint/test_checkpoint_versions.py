"""A run goes on under the version of Megatron-Core that wrote its checkpoints, or a newer one."""

import json
from pathlib import Path

import pytest

from megatron_rl import session
from megatron_rl.checkpoint.names import CHECKPOINTS
from megatron_rl.checkpoint.versions import WRITTEN_BY, refuse_newer
from megatron_rl.config import load_config
from megatron_rl.errors import InputError
from megatron_rl.megatron import faults


@pytest.fixture
def checkpoints(tmp_path):
    """Write the states of checkpoints: iteration -> what state.json says of the version."""

    def write(**states):
        for name, state in states.items():
            folder = tmp_path / f"iteration_{int(name[1:]):06d}"
            folder.mkdir()
            (folder / "state.json").write_text(state if isinstance(state, str) else state_of(state))
        return tmp_path

    return write


def state_of(version):
    return json.dumps({"iteration": 3} | ({} if version is None else {WRITTEN_BY: version[0]}))


@pytest.mark.parametrize(
    ("saved", "installed"),
    [
        (None, "0.16.1"),
        (None, "0.19.2"),
        (["0.16.1"], "0.16.1"),
        (["0.16.1"], "0.19.2"),
        (["0.19.2"], "0.19.2"),
        (["0.18.0"], "0.19.2"),
        (["0.19.2"], "0.20.0"),
        ("{ damaged", "0.16.1"),
        ("[]", "0.16.1"),
    ],
)
def test_an_older_or_equal_version_is_resumed_from(monkeypatch, checkpoints, saved, installed):
    monkeypatch.setattr(faults, "installed_version", lambda: installed)
    refuse_newer(checkpoints(i3=saved))


def test_a_run_without_checkpoints_starts(tmp_path):
    refuse_newer(tmp_path)
    refuse_newer(tmp_path / "not there")


@pytest.mark.parametrize(("saved", "installed"), [("0.19.2", "0.16.1"), ("0.19.2", "0.18.0")])
def test_a_newer_version_is_refused_with_both_ways_out(monkeypatch, checkpoints, saved, installed):
    """Even where an older checkpoint is there: to go on from that would lose iterations."""
    monkeypatch.setattr(faults, "installed_version", lambda: installed)
    directory = checkpoints(i3=["0.16.1"], i6=[saved])
    with pytest.raises(InputError) as refused:
        refuse_newer(directory)
    newest = directory / "iteration_000006"
    assert f"{newest}: Megatron-Core {saved} wrote this checkpoint, and {installed} is" in str(
        refused.value
    )
    assert f"Go on where megatron-core=={saved} is installed, or start" in str(refused.value)
    assert f"model.path={newest}" in str(refused.value)


def test_train_refuses_before_it_reads_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "read_inputs", lambda *_: pytest.fail("it went on"))
    folder = tmp_path / CHECKPOINTS / "iteration_000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state_of(["99.0.0"]))
    recipe = Path(__file__).parents[3] / "examples" / "quickstart" / "sft.yaml"
    with pytest.raises(InputError, match=r"Megatron-Core 99\.0\.0 wrote this checkpoint"):
        session.train_session(load_config(recipe, [f"run.output_dir={tmp_path}"]))
