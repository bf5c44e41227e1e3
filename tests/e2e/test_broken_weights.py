"""A model with a weight that is NaN: one message names it, and nothing is trained or measured."""

import shutil
import subprocess

import pytest
from engine_models import QUICKSTART
from safetensors.torch import load_file, save_file
from training_runs import TP2

NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def broken(runs):
    directory = runs.folder / "models" / "broken"
    if not directory.exists():
        shutil.copytree(runs.folder / "models" / "qwen2", directory)
        tensors = load_file(directory / "model.safetensors")
        tensors[NAME][3, -1] = float("nan")  # of the last columns, which tp_rank 1 holds
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_weight_that_one_rank_reads_is_named_once(runs, broken):
    done = runs.start("train", "broken", 2, *TP2, f"model.path={broken}", stderr=subprocess.PIPE)
    assert done.returncode != 0
    assert done.stderr.count("megatron-rl: error:") == 1
    last = load_file(broken / "model.safetensors")[NAME].shape[1] - 1
    assert f"{NAME}[3, {last}] is nan in torch.float32" in done.stderr
    assert "exitcode  : 2" in done.stderr  # torchrun's own word on each rank
    assert not (runs.folder / "broken" / "metrics.jsonl").exists()


def test_evaluate_gives_no_table_of_a_broken_model(runs, broken):
    benchmark = QUICKSTART / "data" / "heldout.jsonl"
    code, said = runs.command(
        "evaluate",
        "broken evaluation",
        1,
        "algorithm.preset=grpo",
        "rollout.engine=vllm",  # which reads the weights itself
        f"model.path={broken}",
        f"evaluation.benchmarks.some.path={benchmark}",
        "evaluation.benchmarks.some.max_problems=4",
        "evaluation.samples=2",
    )
    assert code == 2
    assert "log-probs of sampled tokens are not finite" in said
    assert "Use another model.path" in said
