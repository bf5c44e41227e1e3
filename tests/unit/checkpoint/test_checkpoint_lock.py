import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl import session
from megatron_rl.checkpoint import lock as module
from megatron_rl.checkpoint.lock import LOCK, RunLock
from megatron_rl.config import load_config
from megatron_rl.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from megatron_rl.checkpoint.lock import RunLock
held = RunLock(Path(sys.argv[1]), print)
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_live_run_is_refused_with_who_holds_it(tmp_path, holder):
    with pytest.raises(InputError) as refused:
        RunLock(tmp_path, pytest.fail)
    assert f"another run writes into it: process {holder.pid} on " in str(refused.value)
    assert f"`kill {holder.pid}`" in str(refused.value)
    assert "remove" not in str(refused.value)  # it would let two runs in


def test_train_refuses_before_it_reads_a_model(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(session, "read_inputs", lambda *_: pytest.fail("it went on"))
    recipe = Path(__file__).parents[3] / "examples" / "quickstart" / "sft.yaml"
    with pytest.raises(InputError, match="another run writes into it"):
        session.train_session(load_config(recipe, [f"run.output_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_killed_run_is_taken_over_with_a_line(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said = []
    RunLock(tmp_path, said.append)
    (line,) = said
    assert line.startswith(f"took over the lock of process {holder.pid} on ")


def test_a_run_that_ended_leaves_nothing_to_say(tmp_path):
    RunLock(tmp_path / "new", pytest.fail).release()
    assert (tmp_path / "new" / LOCK).read_text() == ""
    RunLock(tmp_path / "new", pytest.fail)


@pytest.mark.parametrize("holder_left", [True, False])
def test_a_run_whose_launcher_is_gone_is_waited_for(tmp_path, holder, monkeypatch, holder_left):
    entry = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**entry, "launcher": 1 << 22}))
    said = []

    def sleep(_seconds):
        if holder_left:
            holder.kill()
            holder.wait()

    monkeypatch.setattr(module.time, "sleep", sleep)
    if not holder_left:
        with pytest.raises(InputError, match="another run writes into it"):
            RunLock(tmp_path, said.append)
        assert len(said) == 1  # not once a look
        return
    RunLock(tmp_path, said.append)
    assert said[0].startswith(f"waiting for process {holder.pid} on ")
    assert said[1].startswith(f"took over the lock of process {holder.pid} on ")


@pytest.mark.parametrize("content", ["[]", "{ damaged", '"text"', "{}", ""])
def test_a_damaged_entry_is_nobodys(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    RunLock(tmp_path, pytest.fail)


@pytest.mark.parametrize(
    ("entry", "is_refused"),
    [
        ({"host": "elsewhere", "pid": 1, "born": 1}, True),
        ({"pid": 1 << 22, "born": 5}, False),  # no such process
        ({"pid": os.getpid(), "born": 5}, False),  # another process got its number
        ({"pid": os.getpid(), "born": module._born(os.getpid())}, True),
    ],
)
def test_without_locks_of_the_file_system_the_entry_decides(
    tmp_path, monkeypatch, entry, is_refused
):
    def unsupported(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    here = {**module._here(), **entry}
    (tmp_path / LOCK).write_text(json.dumps(here))
    if not is_refused:
        RunLock(tmp_path, lambda line: None)
        return
    with pytest.raises(InputError) as refused:
        RunLock(tmp_path, lambda line: None)
    way_out = f"remove {tmp_path / LOCK}"
    assert (way_out in str(refused.value)) == (entry.get("host") == "elsewhere")
