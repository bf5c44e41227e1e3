"""Runs over two machines: what crosses the network, and a machine that is lost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_models import QUICKSTART, write_model
from nodes import Node, Nodes
from safetensors.torch import load_file
from training_runs import ROOT

START_S = 1500.0  # until the first iteration is done, on a busy machine
END_S = 45.0  # until a machine has noticed that the other one is gone, and ended
LAUNCH = ["bash", "examples/multi_node/torchrun.sh"]
NOT_COMPARED = ("time/", "memory/", "tokens_per_s", "weights/verified_tensors")
RANKS_PER_NODE = 2
FEW = 3


def recipe_of(folder: Path, name: str, num_iterations: int, **parallel: int) -> dict[str, Any]:
    """A run with engines, or, where its name says so, a supervised one."""
    recipe: dict[str, Any] = {
        "run": {"output_dir": str(folder / name), "num_iterations": num_iterations, "seed": 5},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "prompts": {
            "path": str(QUICKSTART / "data" / "train.jsonl"),
            "prompts_per_iteration": 4,
            "max_prompt_tokens": 64,
        },
        "rollout": {"engine": "vllm", "max_response_tokens": 96},
        "algorithm": {"preset": "sft"},
        "optimizer": {"lr": 3e-4, "prompts_per_update": 4},
        "parallel": parallel,
        "checkpoint": {"save_every": 3},
        "metrics": {"console": "plain"},
    }
    if "supervised" not in name:
        recipe["rollout"] = {"engine": "vllm", "max_response_tokens": 12, "group_size": 4}
        recipe["reward"] = {"kind": "coin_reward:is_even", "num_workers": 1}
        recipe["algorithm"] = {"preset": "grpo"}
    return recipe


class Cluster:
    """Two nodes, and runs on them."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes, self.folder = nodes.all, folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._starts = 0

    def start(self, name: str, num_iterations: int, **parallel: int) -> None:
        """Start the same command on every node, as an operator does."""
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(self.folder, name, num_iterations, **parallel)))
        self._starts += 1
        environment = os.environ | {
            "FIRST_NODE": self.nodes[0].name,
            "NUM_NODES": str(len(self.nodes)),
            "GPUS_PER_NODE": str(RANKS_PER_NODE),
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "e2e")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.running = {
            node.name: node.start([*LAUNCH, str(recipe)], self.log(node), cwd=ROOT, env=environment)
            for node in self.nodes
        }

    def log(self, node: Node) -> Path:
        return self.folder / f"{node.name}.start{self._starts}.log"

    def said(self) -> str:
        """What this start has printed, on all nodes."""
        return "\n".join(f"--- {node.name}\n{self.log(node).read_text()}" for node in self.nodes)

    def finish(self) -> str:
        deadline = time.monotonic() + START_S
        for process in self.running.values():
            code = process.wait(timeout=deadline - time.monotonic())
            assert code == 0, self.said()
        return self.said()

    def wait_for_records(self, name: str, count: int) -> None:
        self._wait(lambda: self.num_records(name) >= count)

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            assert not ended, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)

    def num_records(self, name: str) -> int:
        path = self.folder / name / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def records(self, name: str) -> list[dict[str, Any]]:
        """Metrics, without what a clock or the machine says."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not any(c in k for c in NOT_COMPARED)}
            for line in lines
        ]

    def lose(self, node: Node) -> tuple[float, str]:
        """A node is gone; gives the seconds until the other has ended, and what that one says."""
        (survivor,) = [other for other in self.nodes if other is not node]
        lost = time.monotonic()
        node.kill()
        code = self.running[survivor.name].wait(timeout=START_S)
        seconds = time.monotonic() - lost
        assert code != 0, self.said()
        return seconds, self.log(survivor).read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    write_model("qwen2_tied", folder / "model")
    nodes = Nodes(folder)
    try:
        nodes.connect()
        yield Cluster(nodes, folder)
    except PermissionError as reason:
        pytest.skip(f"no network of its own can be set up here: {reason}")
    finally:
        nodes.close()


@pytest.mark.parametrize(
    ("kind", "num_iterations", "lost"),
    [("supervised", 40, ((1, 4), (0, 25))), ("sampled", 9, ((1, 4), (0, 7)))],
)
def test_a_lost_node_ends_the_run_and_the_same_command_goes_on(cluster, kind, num_iterations, lost):
    """lost: which node, and after how many iterations; the first one keeps torchrun's store."""
    settings = {"num_iterations": num_iterations, "tensor_model_parallel_size": 2}
    straight, disturbed = f"{kind} straight", f"{kind} disturbed"
    cluster.start(straight, **settings)
    said = cluster.finish()
    assert "TP 2 x PP 1 x DP 2" in said
    assert f"done: {num_iterations} optimizer steps" in said  # it learns to the end
    if kind == "sampled":
        assert ", 0.00 MiB of them between 2 nodes" in said  # each node holds the model

    for which, records in lost:
        cluster.start(disturbed, **settings)
        cluster.wait_for_records(disturbed, records)
        node = cluster.nodes[which]
        seconds, reason = cluster.lose(node)
        sys.stdout.write(f"{node.name} lost: the other ended after {seconds:.1f} s\n{reason}\n")
        assert seconds < END_S, reason
        assert "megatron-rl: error:" in reason
        named = "No answer from ranks 2, 3 on node1" if which == 1 else "the first node is lost"
        assert named in reason

    cluster.start(disturbed, **settings)
    assert "resumed after iteration" in cluster.finish()
    assert cluster.records(disturbed) == cluster.records(straight)
    weights = [
        (cluster.folder / name / "hf" / "model.safetensors").read_bytes()
        for name in (disturbed, straight)
    ]
    assert weights[0] == weights[1]


def test_weights_of_a_stage_on_each_node_cross_the_network_as_planned(cluster):
    before = [node.bytes_sent() for node in cluster.nodes]
    cluster.start("stages", num_iterations=FEW, pipeline_model_parallel_size=2)
    said = cluster.finish()
    sent = [node.bytes_sent() - was for node, was in zip(cluster.nodes, before, strict=True)]
    assert "TP 1 x PP 2 x DP 2" in said
    # An engine is on every rank. A node has half of the layers, and gets the others once from the
    # other node; the embeddings, which are the head as well, are on both.
    tensors = load_file(cluster.folder / "model" / "model.safetensors")
    crossing = sum(t.nbytes for name, t in tensors.items() if "embed_tokens" not in name)
    assert f", {crossing / 2**20:.2f} MiB of them between 2 nodes" in said
    sys.stdout.write(f"sent by both nodes: {sum(sent)} bytes, of weights {crossing} a push\n")
    num_pushes = 1 + FEW  # one before the first iteration
    assert sum(sent) >= num_pushes * crossing
