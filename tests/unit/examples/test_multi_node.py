"""The launch scripts with stand-ins for what they start, and the manifests beside them."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
HERE = ROOT / "examples" / "multi_node"
TORCHRUN = HERE / "torchrun.sh"
SBATCH = HERE / "slurm.sbatch"

# Stands in for torchrun: says how it was called, waits to be told, ends as it is told to.
LAUNCHER = """#!/usr/bin/env bash
echo "$@" > "$FOLDER/called"
trap 'echo TERM >> "$FOLDER/told"; STOP=1' TERM
touch "$FOLDER/ready"
while [[ -n "${WAITS:-}" && -z "${STOP:-}" ]]; do sleep 0.05; done
[[ -z "${SAYS:-}" ]] || echo "$SAYS" > "$MEGATRON_RL_END_FILE"
exit "$CODE"
"""


def start(folder, *, code=1, **environment):
    launcher = folder / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    settings = {"FIRST_NODE": "localhost", "NUM_NODES": "2", "PYTHON": str(launcher)}
    return subprocess.Popen(
        ["bash", str(TORCHRUN), "recipe.yaml", "run.seed=3"],
        env=os.environ | settings | {"FOLDER": str(folder), "CODE": str(code)} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("torchrun", "ranks", "expected"),
    [(0, "0", 0), (1, "143", 143), (0, "143", 143), (1, "2", 2), (1, "75", 75), (1, "", 1)],
)
def test_its_exit_code_says_how_the_ranks_ended(tmp_path, torchrun, ranks, expected):
    assert start(tmp_path, code=torchrun, SAYS=ranks).wait(timeout=60) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_script_is_sigterm_to_torchrun(tmp_path, number):
    process = start(tmp_path, SAYS="143", WAITS="yes")
    wait_for(tmp_path / "ready")
    process.send_signal(number)
    assert process.wait(timeout=60) == 143
    assert (tmp_path / "told").read_text() == "TERM\n"


def test_a_stop_before_ranks_can_say_so_is_a_stop(tmp_path):
    process = start(tmp_path, WAITS="yes")
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def test_an_unwanted_end_of_a_run_told_to_stop_is_no_stop(tmp_path):
    process = start(tmp_path, SAYS="2", WAITS="yes")
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 2


def test_sigusr1_to_every_process_does_not_end_torchrun(tmp_path):
    process = start(tmp_path, code=0, SAYS="143", WAITS="yes")
    wait_for(tmp_path / "ready")
    (child,) = map(
        int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )
    os.kill(child, signal.SIGUSR1)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60) == 143


def test_the_first_node_keeps_the_store_whatever_its_name(tmp_path):
    process = start(tmp_path, code=0, NODE_RANK="0", FIRST_NODE="a-name-of-nobody")
    assert process.wait(timeout=60) == 0
    called = (tmp_path / "called").read_text()
    assert "--rdzv-conf is_host=true" in called
    assert called.rstrip().endswith("-m megatron_rl train recipe.yaml run.seed=3")


def test_the_others_wait_for_the_first_node(tmp_path):
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        port = str(first.getsockname()[1])
        process = start(tmp_path, code=0, NODE_RANK="1", FIRST_NODE="127.0.0.1", PORT=port)
        time.sleep(1.0)
        assert not (tmp_path / "called").exists()
        first.listen()
        assert process.wait(timeout=60) == 0
    assert "--rdzv-conf is_host=false" in (tmp_path / "called").read_text()


def test_a_first_node_that_never_answers_is_named(tmp_path):
    with socket.socket() as nobody:  # bound, so that no other listens there
        nobody.bind(("127.0.0.1", 0))
        port = str(nobody.getsockname()[1])
        process = start(*(tmp_path,), NODE_RANK="1", FIRST_NODE="127.0.0.1", PORT=port, WAIT_S="1")
        assert process.wait(timeout=60) == 1
    assert f"nothing answers at 127.0.0.1:{port}" in process.stderr.read()
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("ended", "is_requeued"), [(0, False), (143, True), (2, False), (1, False)]
)
def test_a_slurm_job_goes_back_into_the_queue_after_a_stop_alone(tmp_path, ended, is_requeued):
    for name, body in (
        ("srun", f'echo "$@" > {tmp_path}/srun.called; exit {ended}'),
        ("scontrol", f'echo "$@" >> {tmp_path}/scontrol.called; echo node7'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "41", "SLURM_NNODES": "2"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SBATCH), "recipe.yaml"],
        env=os.environ | job | {"SLURM_JOB_NODELIST": "node[7-8]", "PATH": path},
        timeout=60,
    )
    assert done.returncode == ended
    asked = (tmp_path / "scontrol.called").read_text().splitlines()
    assert ("requeue 41" in asked) is is_requeued
    assert (tmp_path / "srun.called").read_text().rstrip().endswith("recipe.yaml")


def shutdown_timeout():
    return int(re.search(r"--shutdown-timeout (\d+)", TORCHRUN.read_text())[1])


def manifests(name):
    return list(yaml.safe_load_all((HERE / name).read_text()))


def pods(name):
    """The pod templates of a manifest, and the containers that start the run with their command."""
    if name == "pytorchjob.yaml":
        (job,) = manifests(name)
        for replicas in job["spec"]["pytorchReplicaSpecs"].values():
            pod = replicas["template"]["spec"]
            (container,) = pod["containers"]
            yield pod, container, container
    else:
        runtime, job = manifests(name)
        (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        pod = node["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        yield pod, container, job["spec"]["trainer"]


KINDS = pytest.mark.parametrize("name", ["pytorchjob.yaml", "trainjob.yaml"])


@KINDS
def test_a_pod_has_the_time_memory_and_user_that_a_run_needs(name):
    dockerfile = (ROOT / "Dockerfile").read_text()
    user = int(re.search(r"--uid (\d+)", dockerfile)[1])
    workdir = re.search(r"^WORKDIR (\S+)", dockerfile, re.MULTILINE)[1]
    for pod, container, _ in pods(name):
        assert pod["terminationGracePeriodSeconds"] >= shutdown_timeout() + 30
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == user
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[places["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[places[f"{workdir}/runs"]]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


@KINDS
def test_a_pod_starts_the_script_of_all_the_others(name, tmp_path):
    """The command is executed, with the variables that the operator sets."""
    operator = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": "first",
        "PET_MASTER_PORT": "29500",
        "MASTER_ADDR": "first",
        "MASTER_PORT": "29500",
    }
    launcher = tmp_path / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    for *_, start_of_run in pods(name):
        subprocess.run(
            [*start_of_run["command"], *start_of_run["args"]],
            cwd=ROOT,
            env=os.environ
            | operator
            | {"PYTHON": str(launcher), "FOLDER": str(tmp_path), "CODE": "0"},
            check=True,
            timeout=60,
        )
        called = (tmp_path / "called").read_text()
        for option in ("--nnodes 2", "--nproc-per-node 8", "--rdzv-endpoint first:29500"):
            assert option in called
        assert called.rstrip().endswith("megatron_rl train " + " ".join(start_of_run["args"]))


def test_numbers_of_the_manifests_agree():
    (job,) = manifests("pytorchjob.yaml")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    total = sum(part["replicas"] for part in replicas.values())
    assert job["spec"]["runPolicy"]["schedulingPolicy"]["minAvailable"] == total
    for part in replicas.values():
        assert part["restartPolicy"] == "OnFailure"
        (container,) = part["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator looks for these two names
        assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
    runtime, job = manifests("trainjob.yaml")
    assert runtime["metadata"]["name"] == job["spec"]["runtimeRef"]["name"]
    assert runtime["spec"]["mlPolicy"]["numNodes"] == job["spec"]["trainer"]["numNodes"]


def test_a_lost_node_is_repeated_and_a_wrong_recipe_is_not():
    runtime, _ = manifests("trainjob.yaml")
    jobset = runtime["spec"]["template"]["spec"]
    (node,) = jobset["replicatedJobs"]
    job = node["template"]["spec"]
    assert job["backoffLimit"] == 0  # one failed pod fails the job, and all pods are made anew
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert jobset["failurePolicy"]["maxRestarts"] > 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    (rule,) = jobset["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
