"""examples/multi_node/slurm.sbatch under a real Slurm: stopped before its limit, and it goes on."""

import json
import sys
from collections.abc import Iterator

import pytest
import yaml
from engine_models import write_model
from nodes import Nodes
from slurm_cluster import Slurm, wait_until
from training_runs import IMPORTABLE, ROOT, recipe_of

START_S = 1500.0  # until two ranks have trained an iteration, on a busy machine
SCRIPT = "examples/multi_node/slurm.sbatch"
ON_THIS_MACHINE = ("--gpus-per-node=1", "--cpus-per-task=1", "--signal=USR1@60")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    if missing := Slurm.missing():
        pytest.skip(f"no Slurm here (apt install slurm-wlm munge): {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("slurm")
    nodes = Nodes(folder)
    slurm = Slurm(nodes, folder)
    try:
        nodes.connect()
        slurm.start()
        yield slurm
    except PermissionError as reason:
        pytest.skip(f"no network of its own can be set up here: {reason}")
    finally:
        slurm.close()
        nodes.close()


class Job:
    """A submitted run of two ranks, one a node."""

    def __init__(self, slurm: Slurm, name: str, *overrides: str) -> None:
        self.slurm, self.output = slurm, slurm.folder / name
        self.recipe = slurm.folder / f"{name}.yaml"
        self.log = slurm.folder / f"{name}.out"
        write_model("qwen2", slurm.folder / "model")
        self.write_recipe(num_iterations=100_000)
        submitted = slurm.ask(
            *("sbatch", "--parsable", *ON_THIS_MACHINE, "--time=60", f"--output={self.log}"),
            *(SCRIPT, str(self.recipe), *overrides),
            cwd=ROOT,
            PYTHON=sys.executable,
            PYTHONPATH=IMPORTABLE,
            MEGATRON_RL_DEVICE="cpu",
            OMP_NUM_THREADS="1",
        )
        assert submitted.strip().isdigit(), submitted
        self.number = submitted.strip()

    def write_recipe(self, num_iterations: int) -> None:
        recipe = recipe_of(self.slurm.folder / "model", self.output)
        recipe["run"]["num_iterations"] = num_iterations
        recipe["checkpoint"] = {"save_every": 100_000}  # nothing but a stop saves
        recipe["metrics"] = {"console": "plain"}
        self.recipe.write_text(yaml.safe_dump(recipe))

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def records(self) -> list[int]:
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["iteration"] for line in lines]

    def wait_for(self, *states: str) -> None:
        wait_until(lambda: self.slurm.state(self.number) in states, START_S, self.said())

    def wait_for_records(self, count: int) -> None:
        def has_come_so_far() -> bool:
            assert self.slurm.state(self.number) in ("PENDING", "RUNNING"), self.said()
            return len(self.records()) >= count

        wait_until(has_come_so_far, START_S, self.said())

    def update(self, **settings: str) -> None:
        words = [f"{name}={value}" for name, value in settings.items()]
        said = self.slurm.ask("scontrol", "update", f"JobId={self.number}", *words)
        assert not said.strip(), said


def test_a_job_near_its_limit_saves_is_requeued_and_goes_on(slurm):
    job = Job(slurm, "limited")
    job.wait_for_records(3)
    # The limit is now less than a minute away, for which the script asks to be warned.
    hours, minutes, _ = slurm.shown(job.number)["RunTime"].split(":")
    job.update(TimeLimit=str(60 * int(hours) + int(minutes) + 1))
    job.wait_for("PENDING")
    assert "stopped: " in job.said()
    assert "the run has saved and stopped" in job.said()
    saved = sorted(path.name for path in (job.output / "checkpoints").glob("iteration_*"))
    done = len(job.records())
    assert saved[-1] == f"iteration_{done:06d}"  # nothing that was done is lost

    job.write_recipe(num_iterations=done + 2)
    job.update(TimeLimit="60")
    job.wait_for("COMPLETED")
    assert f"resumed after iteration {done}" in job.said()
    assert "done: " in job.said()
    assert job.records() == list(range(1, done + 3))
    assert slurm.shown(job.number)["Restarts"] == "1"


def test_a_pre_emption_is_a_stop(slurm):
    """Slurm sends SIGTERM to the processes of the job's steps alone."""
    job = Job(slurm, "preempted")
    job.wait_for_records(2)
    slurm.ask("scancel", "--signal=TERM", job.number)
    job.wait_for("PENDING")
    assert "stopped: " in job.said()
    slurm.ask("scancel", job.number)


def test_a_recipe_that_cannot_work_is_not_repeated(slurm):
    job = Job(slurm, "wrong", "rollout.no_such_setting=1")
    job.wait_for("FAILED")
    assert slurm.shown(job.number)["ExitCode"] == "2:0", job.said()
    assert "no_such_setting" in job.said()
    assert slurm.shown(job.number)["Restarts"] == "0"


# Stands in for torchrun and its ranks: waits to be told to stop, saves for a while, is done when
# it is started again. The nodes take different times to save.
LAUNCHER = """#!/usr/bin/env bash
echo "node $NODE_RANK of $NUM_NODES, first $FIRST_NODE" >> "$FOLDER/starts"
if [[ $NODE_RANK == 0 ]]; then # where the other node looks whether the first is there
    python3 -c 'import os, socket, time
with socket.create_server(("0.0.0.0", int(os.environ["PORT"]))):
    time.sleep(120)' &
fi
if [[ -e "$FOLDER/saved1" ]]; then
    touch "$FOLDER/done$NODE_RANK"
    until [[ -e "$FOLDER/done1" ]]; do sleep 0.2; done
    kill $(jobs -p) 2> /dev/null
    echo 0 > "$MEGATRON_RL_END_FILE"
    exit 0
fi
trap 'STOP=1' TERM
while [[ -z "${STOP:-}" ]]; do sleep 0.2; done
sleep $((1 + 4 * NODE_RANK))
touch "$FOLDER/saved$NODE_RANK"
kill $(jobs -p) 2> /dev/null
echo 143 > "$MEGATRON_RL_END_FILE"
exit 1
"""


@pytest.mark.parametrize("reason", ["time limit", "pre-emption"])
def test_slurm_tells_every_node_and_starts_the_job_again(slurm, tmp_path, reason):
    """The same without training, so that only Slurm and the scripts take part: a minute."""
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    log = tmp_path / "job.out"
    number = slurm.ask(
        *("sbatch", "--parsable", *ON_THIS_MACHINE, "--time=60", f"--output={log}"),
        *(SCRIPT, "recipe.yaml"),
        cwd=ROOT,
        PYTHON=str(launcher),
        FOLDER=str(tmp_path),
    ).strip()
    starts = tmp_path / "starts"

    def num_starts() -> int:
        return len(starts.read_text().splitlines()) if starts.exists() else 0

    wait_until(lambda: num_starts() == 2, 120, "the job does not start")
    if reason == "time limit":
        slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=1")
    else:
        slurm.ask("scancel", "--signal=TERM", number)
    wait_until(lambda: slurm.state(number) == "PENDING", 180, log.read_text())
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    wait_until(lambda: slurm.state(number) == "COMPLETED", 180, log.read_text())
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert slurm.shown(number)["Restarts"] == "1"
