"""The real `megatron-rl doctor` on this machine, and its clocks between two agents of torchrun."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from harness import STUCK_S
from training_runs import IMPORTABLE

from megatron_rl.doctor.report import all_checks

pytestmark = pytest.mark.slow

MINE = {"PYTHONPATH": IMPORTABLE, "MEGATRON_RL_DEVICE": "cpu"}


def test_the_real_command_finds_a_machine_that_works(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rl", "doctor", "--deadline", "500"],
        cwd=tmp_path,
        env=os.environ | MINE,
        capture_output=True,
        text=True,
        timeout=2 * STUCK_S,
    )
    assert done.stderr == ""
    rows = re.findall(
        r"^(\S.*?)  +(ok|warning|failed|not there)  +(.*)$", done.stdout, re.MULTILINE
    )
    found = {name: (outcome, text) for name, outcome, text in rows}
    assert list(found) == [check.name for check in all_checks(tmp_path, has_vllm=True)]
    assert found["all-reduce"][0] == "ok", done.stdout
    assert found["vLLM"][0] in ("ok", "warning"), done.stdout
    assert "sampled 8 tokens of a tiny model" in found["vLLM"][1]
    assert found["native ops"][0] in ("ok", "not there"), done.stdout
    assert found["clock"] == ("ok", "one machine")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^17 checks in \d+ s: nothing failed", done.stdout, re.MULTILINE)


def test_machines_of_a_torchrun_job_compare_their_clocks():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "a"]
    program = str(Path(__file__).with_name("clock_on_machines.py"))
    agents = [
        subprocess.Popen(
            [sys.executable, *torchrun, *meet, program],
            env=os.environ | MINE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    told = [agent.communicate(timeout=STUCK_S) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], told
    results = [json.loads(out.splitlines()[-1]) for out, _ in told]
    assert [result["outcome"] for result in results] == ["ok", "ok"]
    texts = sorted((result["found"] for result in results), key=lambda text: text.split("from")[1])
    assert texts[0].endswith("apart from all others of 2 machines")
    assert texts[1].endswith("apart from the first of 2 machines")
