"""PPO, iterative DPO and a student of a teacher, sampled and resumed: the same bits.

DPO's responses are the policy's own, the others are vLLM's.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_models import QUICKSTART, write_model
from forked import run_command
from safetensors.torch import load_file
from training_runs import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow

# What a clock or the machine says, and how much of the weights was verified: all, after a resume.
NOT_COMPARED = ("time/", "memory/", "tokens_per_s", "weights/verified_tensors")
KINDS: dict[str, dict[str, Any]] = {
    "ppo": {
        "algorithm": {
            "preset": "ppo",
            "gae_lambda": 0.9,
            "kl_reward_coef": 0.2,
            "kl_reward_target": 0.5,
            "kl_reward_horizon": 100,
            "selection": ["balanced"],
            "balanced_size": 2,
        },
        "critic": {"lr": 3e-3, "warmup_updates": 2},
        # One response after the other, until one is right and one is wrong, and further prompts;
        # every token of a part of the vocabulary.
        "rollout": {
            "engine": "vllm",
            "group_size": 1,
            "top_k": 12,
            "top_p": 0.9,
            "rounds": {"max_responses": 4, "fill": True},
        },
        "parallel": {"tensor_model_parallel_size": 2},
    },
    "iterative_dpo": {
        "algorithm": {"preset": "iterative_dpo"},
        "rollout": {"group_size": 4, "top_k": 80},  # of so small a model the policy
    },
    # A mixture, routed as the engine routed.
    "distillation": {
        "model": {
            "megatron": {
                "moe_router_load_balancing_type": "global_aux_loss",
                "moe_aux_loss_coeff": 0.01,
                "moe_z_loss_coeff": 0.001,
            }
        },
        "algorithm": {
            "preset": "distillation",
            "rollout_correction": {"level": "sequence", "mode": "mask", "low": 0.5},
        },
        "rollout": {"engine": "vllm", "group_size": 2, "routing_replay": True},
        "parallel": {"pipeline_model_parallel_size": 2},
    },
}


def recipe_of(kind: str, model_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Four iterations of two updates and two epochs each; two ranks."""
    part = dict(KINDS[kind])
    if kind == "distillation":
        part["reference"] = {"path": str(model_dir.with_name("teacher"))}
    return {
        "run": {"output_dir": str(output_dir), "num_iterations": 4, "seed": 5},
        "prompts": {
            "path": str(QUICKSTART / "data" / "train.jsonl"),
            "prompts_per_iteration": 12,
            "max_prompt_tokens": 64,
        },
        "reward": {"kind": "coin_reward:is_even", "num_workers": 1},
        "optimizer": {"lr": 3e-3, "prompts_per_update": 6, "epochs": 2},
        "checkpoint": {"save_every": 2},
        "debug": {"record": 2},
        "metrics": {"kl_every": 1, "kl_rollouts": 8, "entropy_every": 1},
        **part,
        "model": {"path": str(model_dir), "dtype": "float32", **part.get("model", {})},
        "rollout": {"max_response_tokens": 12, **part["rollout"]},
    }


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory):
    """Folders of a run straight to its end, and of one that was killed before its last save."""
    folder = tmp_path_factory.mktemp(request.param)
    model = "qwen3_moe" if request.param == "distillation" else "qwen2_tied"
    write_model(model, folder / "model")
    if request.param == "distillation":
        write_model("llama", folder / "teacher")
    train(request.param, folder, "straight")
    shutil.copytree(folder / "straight", folder / "stopped")
    for lost in ("hf", "checkpoints/iteration_000004"):
        shutil.rmtree(folder / "stopped" / lost)
    assert "resumed after iteration 2" in train(request.param, folder, "stopped")
    return request.param, folder


def train(kind: str, folder: Path, name: str) -> str:
    recipe = recipe_of(kind, folder / "model", folder / name)
    return launch(recipe, folder / f"{name}.yaml", ranks=2)


def launch(recipe: dict[str, Any], path: Path, *, ranks: int) -> str:
    """What it printed."""
    path.write_text(yaml.safe_dump(recipe))
    code, said = run_command(["train", str(path)], ranks, ROOT, ENVIRONMENT)
    assert code == 0, said[-8000:]
    return said


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not any(c in k for c in NOT_COMPARED)}
        for line in lines
    ]


def test_a_resumed_run_ends_where_it_would_have_ended(runs):
    _, folder = runs
    for name in ("hf/model.safetensors", "hf/critic/value_head.safetensors"):
        if not (folder / "straight" / name).exists():
            assert name.startswith("hf/critic")
            continue
        assert (folder / "stopped" / name).read_bytes() == (folder / "straight" / name).read_bytes()
    straight, stopped = records(folder / "straight"), records(folder / "stopped")
    assert [record["iteration"] for record in straight] == [1, 2, 3, 4]
    assert stopped == straight


def test_recorded_rollouts_train_to_the_same_bits_without_an_engine(runs):
    """From the checkpoint in the middle, in another directory."""
    kind, folder = runs
    kept = sorted(path.name for path in (folder / "straight" / "debug").iterdir())
    assert kept == ["iteration_000003", "iteration_000004"]
    middle = "checkpoints/iteration_000002"
    shutil.copytree(folder / "straight" / middle, folder / "replayed" / middle)
    recipe = recipe_of(kind, folder / "model", folder / "replayed")
    recipe["debug"] = {"replay": str(folder / "straight")}
    said = launch(recipe, folder / "replayed.yaml", ranks=2)
    assert "of iterations 3, 4; no engine, no evaluation" in said
    assert "engine probe" not in said
    weights = "hf/model.safetensors"
    assert (folder / "replayed" / weights).read_bytes() == (
        folder / "straight" / weights
    ).read_bytes()
    for found, expected in zip(
        records(folder / "replayed"), records(folder / "straight")[2:], strict=True
    ):
        without = ("weights/", "rollout/rounds")  # nothing is sent or sampled
        assert found == {k: v for k, v in expected.items() if not k.startswith(without)}


def test_a_trainer_that_leaves_the_device_ends_at_the_same_bits(runs):
    """All of it, with a save in the middle; then resumed from there, and nothing leaves."""
    kind, folder = runs
    if kind != "ppo":
        pytest.skip("one kind is enough, and this has two models")
    recipe = recipe_of(kind, folder / "model", folder / "away")
    recipe["optimizer"]["offload"] = "weights"
    said = launch(recipe, folder / "away.yaml", ranks=2)
    assert "offload: weights, gradients, main weights and optimizer state go to host memory" in said
    assert same_ends(folder / "away", folder / "straight")
    shutil.copytree(folder / "away", folder / "back")
    for lost in ("hf", "checkpoints/iteration_000004"):
        shutil.rmtree(folder / "back" / lost)
    said = train(kind, folder, "back")
    assert "resumed after iteration 2" in said
    assert "offload: nothing of the trainer leaves the device" in said
    assert same_ends(folder / "back", folder / "straight")


def same_ends(one: Path, other: Path) -> bool:
    """Exports, metrics, and every tensor of the checkpoint."""
    exports = ("hf/model.safetensors", "hf/critic/value_head.safetensors")
    return (
        all((one / name).read_bytes() == (other / name).read_bytes() for name in exports)
        and records(one) == records(other)
        and tensors_of(one) == tensors_of(other)
    )


def tensors_of(folder: Path) -> dict[str, Any]:
    """Digests of the files of the last checkpoint that hold tensors, of both models."""
    manifest = folder / "checkpoints" / "iteration_000004" / "MANIFEST.json"
    files = json.loads(manifest.read_text())["files"]
    found = {name: entry for name, entry in files.items() if name.endswith(".distcp")}
    assert {name.partition("/")[0] for name in found} == {"policy", "critic"}
    return found


def test_it_trained(runs):
    kind, folder = runs
    rows = records(folder / "straight")
    start = load_file(folder / "model" / "model.safetensors")
    end = load_file(folder / "straight" / "hf" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    assert (start[name] - end[name]).abs().max() > 1e-3
    if kind == "iterative_dpo":
        assert all(row["policy/pairs"] >= 1 for row in rows)
        assert all(0.1 < row["algorithms/kept_responses_frac"] < 0.6 for row in rows)
        # Exactly 0 in each iteration's first update, whose reference is the policy itself.
        assert sum(row["policy/pair_margin_mean"] for row in rows) / len(rows) > 1
    if kind == "distillation":
        assert rows[-1]["policy/kl_ref_k3"] < 0.5 * rows[0]["policy/kl_ref_k3"]
        assert all(0.99 < row["policy/correction_mean"] < 1.01 for row in rows)
        assert all(row["algorithms/kept_responses_frac"] == 1 for row in rows)
        assert all(1 <= row["policy/load_balancing_loss"] < 4 for row in rows)
        assert all(row["policy/router_z_loss"] > 0 for row in rows)
    assert all(0 < row["policy/entropy_sampled"] < 5 for row in rows)
    top_k = KINDS[kind]["rollout"].get("top_k")
    sizes = [row.get("rollout/support_mean") for row in rows]
    assert all(size is None if top_k is None else 1 < size <= top_k for size in sizes)


def test_rounds_draw_until_a_batch_is_full(runs):
    """One prompt in eight has four responses of the same verdict."""
    kind, folder = runs
    if kind != "ppo":
        pytest.skip("there are no rounds")
    rows = records(folder / "straight")
    assert all(row["rollout/rounds"] >= 4 for row in rows)
    assert all(row["rollout/filled_groups"] == 12 for row in rows)
    assert all(row["rollout/missing_groups"] == 0 for row in rows)
    assert all(row["algorithms/kept_responses"] == 2 * 12 for row in rows)
    assert any(row["rollout/prompts"] > 12 for row in rows)
    for row in rows:
        assert row["rollout/responses"] > 2 * row["rollout/filled_groups"]
        assert row["algorithms/wasted_responses"] == row["rollout/responses"] - 24
        assert row["rollout/prompts_satisfied_frac"] < 1 or row["rollout/prompts"] == 12


def test_the_critic_learns_first_and_its_coefficient_follows(runs):
    kind, folder = runs
    if kind != "ppo":
        pytest.skip("there is no critic")
    rows = records(folder / "straight")
    assert [row["policy/updates"] for row in rows] == [2.0, 4.0, 4.0, 4.0]  # it waited for two
    assert len({row["critic/kl_reward_coef"] for row in rows}) == 4
    assert abs(rows[-1]["critic/value_mean"] - rows[0]["critic/value_mean"]) > 0.01
    saved = load_file(folder / "straight" / "hf" / "critic" / "value_head.safetensors")
    assert saved["value_head.weight"].shape == (1, 128)
    assert saved["value_head.weight"].abs().max() > 1e-3


def test_an_exported_critic_starts_the_next_run(runs):
    """Its values are about what they were, from the first iteration on."""
    kind, folder = runs
    if kind != "ppo":
        pytest.skip("there is no critic")
    recipe = recipe_of(kind, folder / "straight" / "hf", folder / "next")
    recipe["critic"] = {"path": str(folder / "straight" / "hf" / "critic")}
    recipe["run"]["num_iterations"] = 1
    recipe["parallel"] = {}
    launch(recipe, folder / "next.yaml", ranks=1)
    (row,) = records(folder / "next")
    last = records(folder / "straight")[-1]
    assert last["critic/value_mean"] < -0.5
    # Other prompts, and four updates later; those of a new value head are exactly 0.
    assert row["critic/value_mean"] == pytest.approx(last["critic/value_mean"], abs=0.8)
