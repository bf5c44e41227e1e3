"""Every shipped recipe is valid, and the paper's differ only in what their method changes."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.config import load_config
from megatron_rl.plan import print_plan, settled_plan

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPES = sorted(set(EXAMPLES.glob("*/*.yaml")) - set(EXAMPLES.glob("multi_node/*.yaml")))
PAPER = sorted((EXAMPLES / "paper").glob("*.yaml"))
QWEN_MATH_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_is_valid(recipe):
    config = load_config(recipe, [])
    assert config.run.output_dir.startswith("runs/")


@pytest.mark.parametrize("recipe", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipes_change_only_what_the_method_changes(recipe):
    base = load_config(EXAMPLES / "paper" / "base.yaml", []).model_dump()
    own = load_config(recipe, []).model_dump()
    changed = {section for section in base if base[section] != own[section]}
    allowed = {"run", "algorithm"}
    if recipe.stem in ("ppo",):
        allowed |= {"rollout"}  # one response a prompt
    if recipe.stem in ("llama_3b", "minimal_rl_1_5b"):
        allowed |= {"model", "parallel", "rollout", "reward"}
    if recipe.stem == "evaluate":
        allowed |= {"prompts", "parallel", "evaluation"}
    assert changed <= allowed
    run = {key for key in base["run"] if base["run"][key] != own["run"][key]}
    assert run <= {"output_dir"}
    assert recipe.stem in ("base", "reinforce") or own["run"]["output_dir"].endswith(recipe.stem)


def test_the_papers_evaluation():
    config = load_config(EXAMPLES / "paper" / "evaluate.yaml", [])
    evaluation = config.evaluation
    assert list(evaluation.benchmarks) == ["math500", "minerva_math", "olympiadbench"]
    assert (evaluation.samples, evaluation.temperature) == (16, 1.0)
    assert evaluation.max_response_tokens == 4096
    assert config.smallest_world == 1
    files = {benchmark.path for benchmark in evaluation.benchmarks.values()}
    assert config.prompts.path in files  # nothing but the benchmarks has to be prepared


def test_there_is_a_recipe_for_every_row_and_ablation_of_the_paper():
    rows = {"raft", "raft_pp", "iterative_dpo", "reinforce", "grpo", "ppo", "reinforce_rej"}
    ablations = {
        "reinforce_remove_all_wrong",
        "reinforce_remove_all_correct",
        "reinforce_rej_norm",
        "reinforce_mean_zero",
    }
    for name in rows | ablations:
        config = load_config(EXAMPLES / "paper" / f"{name}.yaml", [])
        assert config.algorithm.preset == name
        assert (config.optimizer.lr, config.optimizer.prompts_per_update) == (1e-6, 512)


@pytest.mark.parametrize("name", ["grpo", "ppo", "iterative_dpo"])
def test_a_plan_of_the_papers_setting_fits_eight_gpus_of_80_gib(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_MATH_7B))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    overrides = [f"model.path={tmp_path}", "parallel.world_size=8"]
    print_plan(settled_plan(load_config(EXAMPLES / "paper" / f"{name}.yaml", overrides)))
    printed = capsys.readouterr().out
    assert "engine: vllm, since it is for GPUs. " in printed
    assert "8 = TP 4 x PP 1 x DP 2" in printed
    (total,) = re.findall(r"sum of the update +([0-9.]+) GiB", printed)
    assert 20 < float(total) < 72  # the rest is for the key/value cache
