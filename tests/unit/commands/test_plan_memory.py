"""What `plan` says of memory: of the device it is for, and of this machine, never as an error."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl import plan as module
from megatron_rl.config import RunConfig
from megatron_rl.megatron.config import ModelConfig
from megatron_rl.memory import GIB
from megatron_rl.plan import print_layouts, print_plan
from megatron_rl.platforms import host_memory
from megatron_rl.platforms.base import CPU

SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def a_laptop(monkeypatch):
    """A machine of 8 cores without a GPU."""
    for name in ("MEGATRON_RL_DEVICE", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "detect", lambda: CPU)
    monkeypatch.setattr("os.cpu_count", lambda: 8)


@pytest.fixture
def planned(monkeypatch, tmp_path, capsys):
    """The lines of the memory of a plan where so much is free."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")

    def plan(gib, dtype="float32", gpu_gib=79.6, **sections):
        monkeypatch.setattr(host_memory, "available_bytes", lambda: gib * GIB)
        recipe = {
            "run": {"output_dir": "runs/a", "num_iterations": 3},
            "model": {"path": str(tmp_path), "dtype": dtype},
            "prompts": {"path": "none", "prompts_per_iteration": 64, "max_prompt_tokens": 96},
            "rollout": {"engine": "vllm", "group_size": 8, "max_response_tokens": 160},
            "algorithm": {"preset": "grpo"},
            **sections,
        }
        print_plan(RunConfig.model_validate(recipe), gpu_gib=gpu_gib)
        plan.text = text = capsys.readouterr().out
        memory = text.partition("memory per rank\n")[2].partition("weight sync")[0]
        plan.of_a_gpu, _, plan.here = memory.partition("memory per rank on this machine\n")
        return plan.of_a_gpu

    return plan


def test_a_run_of_a_cpu_is_compared_with_this_machine(planned):
    said = planned(400, parallel={"world_size": 2})
    assert "device                             cpu\n" in said
    assert "key/value cache                    2.812 GiB" in said
    assert "it fits: 200.0 GiB of this machine's memory are free for it (400.0 GiB for 2" in said


def test_where_prompts_are_shared_is_said(planned, monkeypatch):
    planned(400, parallel={"world_size": 2})
    assert "once for all responses in a row: cpu\n" in planned.text
    planned(400, parallel={"world_size": 2}, batching={"share_prompts": False})
    assert "once a response\n" in planned.text
    monkeypatch.setattr(
        ModelConfig, "uses_transformer_engine", lambda _, device_type: device_type == "cuda"
    )
    planned(400, "bfloat16", parallel={"world_size": 2})  # for a GPU, too
    assert "once for all responses in a row: cpu\n" in planned.text


def test_a_row_that_would_be_shorter_here_is_said(planned):
    said = planned(32, parallel={"world_size": 2})
    assert "packed row: up to " in said
    assert "in the place of 16384" in said


def test_what_train_would_refuse_is_a_line_and_no_error(planned):
    said = planned(8, parallel={"world_size": 2}, batching={"max_tokens_per_microbatch": 16384})
    assert "train would refuse it here: memory: a rank needs some" in said
    assert "packed row: " not in said
    assert "key/value cache: " not in said


def test_more_ranks_than_this_machine_has_cores_are_meant_for_others(planned):
    said = planned(1, parallel={"world_size": 64})
    assert "not compared: this machine has no room for 64 ranks on a CPU" in said


def test_bfloat16_is_taken_to_be_meant_for_gpus_where_nothing_else_is_said(planned, monkeypatch):
    said = planned(400, dtype="bfloat16")
    assert "device                             cuda, of which there is none here" in said
    assert "process and libraries" not in said
    assert "not compared, since it has no such GPUs; a GPU of 79.6 GiB has 77.1 GiB for it" in said
    assert "it fits" in said
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")
    said = planned(400, dtype="bfloat16")
    assert "device                             cpu\n" in said
    assert "it fits: 400.0 GiB" in said


def test_a_recipe_that_may_be_meant_for_gpus_is_planned_for_this_machine_too(planned):
    planned(400, dtype="bfloat16")
    assert planned.here.startswith("  device                             cpu\n")
    assert "process and libraries" in planned.here
    assert "it fits: 400.0 GiB of this machine's memory are free" in planned.here
    planned(400, dtype="bfloat16", parallel={"world_size": 64})
    assert planned.here == ""


def test_a_plan_for_a_gpu_has_two_sums_which_never_live_together(planned):
    """134,515,008 parameters: gradients of 4 bytes, main weights and moments of 12."""
    params = 134_515_008
    said = planned(400, "bfloat16")
    sizes = sizes_in(said)
    assert sizes["weights"] == sizes["stays of the trainer then"]
    assert sizes["weights"] == pytest.approx(2 * params / GIB, abs=1e-3)
    assert sizes["sum of the rollout"] == pytest.approx(2 * params / GIB + 39.8, abs=2e-3)
    in_step = (2 + 4 + 12) * params / GIB
    row = next(value for name, value in sizes.items() if name.startswith("activations"))
    in_backward = sizes["weights"] + sizes["gradients"] + row + sizes["logits of one chunk"]
    assert sizes["sum of the update"] == pytest.approx(max(in_step, in_backward), abs=3e-3)
    assert "in the optimizer's step only" in said
    assert sizes["state that left"] == pytest.approx(12 * params / GIB, abs=1e-3)

    stays = sizes_in(planned(400, "bfloat16", optimizer={"offload": "none"}))
    assert stays["stays of the trainer then"] == pytest.approx(in_step, abs=3e-3)
    assert stays["sum of the rollout"] == pytest.approx(in_step + 39.8, abs=4e-3)
    assert stays["sum of the update"] == pytest.approx(in_backward + 12 * params / GIB, abs=5e-3)
    assert "state that left" not in stays

    gone = sizes_in(planned(400, "bfloat16", optimizer={"offload": "weights"}))
    assert gone["stays of the trainer then"] == 0
    assert gone["sum of the rollout"] == pytest.approx(39.8, abs=1e-3)


def test_two_updates_have_the_optimizer_beside_activations(planned):
    one = sizes_in(planned(400, "bfloat16"))
    two = sizes_in(planned(400, "bfloat16", optimizer={"epochs": 2}))
    row = next(value for name, value in one.items() if name.startswith("activations"))
    parts = one["weights"] + one["gradients"] + one["optimizer"] + row + one["logits of one chunk"]
    assert two["sum of the update"] == pytest.approx(parts, abs=3e-3)
    assert two["sum of the rollout"] == one["sum of the rollout"]


def test_a_gpu_that_is_too_small_is_named_with_what_would_help(planned):
    said = planned(400, "bfloat16", gpu_gib=8, optimizer={"offload": "none"})
    assert "GiB too much" in said
    assert "it does not fit. It would with `" in said
    assert "`optimizer.offload=optimizer`" in said


def sizes_in(said):
    rows = (re.match(r"  (\S.*?) +(\d+\.\d{3}) GiB", line) for line in said.splitlines())
    return {row[1]: float(row[2]) for row in rows if row}


def test_a_teacher_is_counted_beside_the_policy_by_its_own_size(planned, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text(json.dumps(SIZES | {"num_hidden_layers": 60}))
    save_file({"x": torch.zeros(1)}, teacher / "model.safetensors")
    text = planned(100, algorithm={"preset": "distillation"}, reference={"path": str(teacher)})
    rows = dict(line.rsplit(None, 2)[:2] for line in text.splitlines() if line.endswith(" GiB"))
    layer = 576 * (576 + 2 * 192 + 576 + 3 * 1536) + 2 * 576  # attention, MLP, norms
    counts = {layers: 49152 * 576 + layers * layer + 576 for layers in (30, 60)}
    sizes = {name.strip(): float(gib) for name, gib in rows.items()}
    assert sizes["weights"] == pytest.approx(counts[30] * 4 / GIB, abs=1e-3)
    assert sizes["reference model"] == pytest.approx(counts[60] * 4 / GIB, abs=1e-3)
    assert "first weights" not in sizes
    assert "first weights" in planned(100, algorithm={"preset": "grpo", "kl_coef": 0.1})


def test_a_correction_is_among_the_passes(planned, capsys, monkeypatch):
    said = []
    monkeypatch.setattr(
        "builtins.print", lambda *words, **_: said.append(" ".join(map(str, words)))
    )
    planned(100, algorithm={"preset": "grpo", "rollout_correction": {"mode": "mask", "low": 0.5}})
    (line,) = (line for line in said if "rollout correction" in line)
    assert line.endswith("by token, mask outside of 0.5 to 2")


def test_layouts_are_printed_as_settings_that_a_plan_takes(planned, capsys, tmp_path):
    planned(16, "bfloat16")
    recipe = {
        "run": {"output_dir": "runs/a", "num_iterations": 3},
        "model": {"path": str(tmp_path)},
        "prompts": {"path": "none", "max_prompt_tokens": 96},
        "rollout": {"engine": "vllm", "group_size": 8, "max_response_tokens": 160},
        "algorithm": {"preset": "grpo"},
    }
    print_layouts(RunConfig.model_validate(recipe), 12)
    said = capsys.readouterr().out
    assert said.startswith("layouts on 12 GPUs, by a cost model that no GPU has confirmed")
    found = [line.split()[1:] for line in said.splitlines() if line.startswith("  settings")]
    # Nine heads and 30 layers leave 1, 2, 3 and 6 stages; with embedding and loss as layers, 4.
    assert len(found) == 5
    for settings in found:
        values = dict(setting.split("=") for setting in settings)
        assert values["parallel.world_size"] == "12"
        sizes = {n.partition(".")[2]: int(v) for n, v in values.items() if n.endswith("_size")}
        ranks = sizes.pop("world_size")
        assert ranks % math.prod(sizes.values()) == 0
