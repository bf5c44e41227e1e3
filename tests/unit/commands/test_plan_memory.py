"""What `plan` says of memory: of the device it is for, and of this machine, never as an error."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl import plan as module
from megatron_rl.config import RunConfig
from megatron_rl.memory import GIB
from megatron_rl.plan import print_plan
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

    def plan(gib, dtype="float32", **sections):
        monkeypatch.setattr(host_memory, "available_bytes", lambda: gib * GIB)
        recipe = {
            "run": {"output_dir": "runs/a", "num_iterations": 3},
            "model": {"path": str(tmp_path), "dtype": dtype},
            "prompts": {"path": "none", "prompts_per_iteration": 64, "max_prompt_tokens": 96},
            "rollout": {"group_size": 8, "max_response_tokens": 160},
            "algorithm": {"preset": "grpo"},
            **sections,
        }
        print_plan(RunConfig.model_validate(recipe))
        text = capsys.readouterr().out
        return text.partition("memory per rank\n")[2].partition("weight sync")[0]

    return plan


def test_a_run_of_a_cpu_is_compared_with_this_machine(planned):
    said = planned(400, parallel={"world_size": 2})
    assert "device                             cpu\n" in said
    assert "key/value cache                    2.812 GiB" in said
    assert "it fits: 200.0 GiB of this machine's memory are free for it (400.0 GiB for 2" in said


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
    assert "not compared: this machine has no GPU" in said
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")
    said = planned(400, dtype="bfloat16")
    assert "device                             cpu\n" in said
    assert "it fits: 400.0 GiB" in said


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
