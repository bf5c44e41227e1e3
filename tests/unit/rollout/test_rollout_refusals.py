"""The bounds of our settings are the engine's own."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from rollout_models import ARCH

from megatron_rl.megatron.config import ModelConfig
from megatron_rl.platforms.base import CPU, CUDA
from megatron_rl.rollout.config import LEAST_TEMPERATURE, MOST_TEMPERATURE, RolloutConfig
from megatron_rl.rollout.refusals import (
    CPU_HEAD_DIMS,
    CPU_LATENT,
    device_problems,
    engine_problems,
)
from megatron_rl.weights.arch import DeltaArch, LatentArch, MixtureArch

MODEL = ModelConfig(path="model")
CPU_NETS = "model_executor/layers/mamba/ops/cpu/gdn_attention.py"
NETS = replace(
    ARCH,
    delta=DeltaArch(
        attention_layers=frozenset({1}),
        num_key_heads=6,
        num_value_heads=6,
        key_dim=8,
        value_dim=8,
        kernel=4,
    ),
)
LATENT = replace(
    ARCH,
    num_query_groups=ARCH.num_attention_heads,
    head_dim=74,  # which is of no matter there
    latent=LatentArch(
        rank=512, query_rank=None, still_dim=10, turning_dim=64, value_dim=10, interleaved=True
    ),
)


def test_vllm_takes_the_temperatures_that_we_take_and_no_others():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for temperature in (LEAST_TEMPERATURE, MOST_TEMPERATURE):
        assert SamplingParams(temperature=temperature).temperature == temperature
    assert SamplingParams(temperature=LEAST_TEMPERATURE / 2).temperature == LEAST_TEMPERATURE
    with pytest.raises(VLLMValidationError, match="temperature must be in"):
        SamplingParams(temperature=MOST_TEMPERATURE * 1.01)


def test_the_head_sizes_are_those_of_vllms_attention_on_a_cpu():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_DIMS) == CPUAttentionBackend.get_supported_head_sizes()


def test_a_head_size_that_the_engine_lacks_on_a_cpu_is_refused_there_alone(monkeypatch):
    other = replace(ARCH, head_dim=16)
    monkeypatch.setattr(type(CUDA), "total_memory_bytes", lambda self: 1 << 36)
    assert not list(device_problems(ARCH, RolloutConfig(), MODEL, CPU))
    (problem,) = device_problems(other, RolloutConfig(), MODEL, CPU)
    assert "its attention heads have 16 elements" in str(problem)
    assert not list(device_problems(other, RolloutConfig(), MODEL, CUDA))
    assert not list(device_problems(other, RolloutConfig(engine="megatron"), MODEL, CPU))


def test_the_sizes_of_latent_attention_are_those_of_vllms_on_a_cpu():
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

    assert CPUMLABackend.get_supported_head_sizes() == [sum(CPU_LATENT)]


def test_latent_attention_that_the_engine_lacks_on_a_cpu_is_refused_there_alone(monkeypatch):
    monkeypatch.setattr(type(CUDA), "total_memory_bytes", lambda self: 1 << 36)
    assert not list(device_problems(LATENT, RolloutConfig(), MODEL, CPU))
    other = replace(LATENT, latent=replace(LATENT.latent, rank=256))
    (problem,) = device_problems(other, RolloutConfig(), MODEL, CPU)
    assert "kv_lora_rank=256 and qk_rope_head_dim=64: on a CPU vLLM has 512 and 64" in str(problem)
    assert not list(device_problems(other, RolloutConfig(), MODEL, CUDA))
    assert not list(device_problems(other, RolloutConfig(engine="megatron"), MODEL, CPU))


def test_delta_nets_that_the_engine_has_in_one_dtype_on_a_cpu_are_refused_there(monkeypatch):
    monkeypatch.setattr(type(CUDA), "total_memory_bytes", lambda self: 1 << 36)
    (problem,) = device_problems(NETS, RolloutConfig(), MODEL, CPU)
    assert "which vLLM 0.32 runs on a CPU in bfloat16 alone" in str(problem)
    assert str(problem).endswith("Set rollout.engine=megatron")
    assert not list(device_problems(NETS, RolloutConfig(), MODEL, CUDA))
    assert not list(device_problems(NETS, RolloutConfig(engine="megatron"), MODEL, CPU))
    source = (Path(find_spec("vllm").origin).parent / CPU_NETS).read_text()
    assert "CPU GDN attention requires BF16" in source


def test_an_engine_cuts_the_heads_of_delta_nets():
    found = list(map(str, engine_problems(NETS, 4)))
    for name in ("key heads of gated delta nets", "value heads of gated delta nets"):
        assert sum(name in problem for problem in found) == 1
    assert not [told for told in map(str, engine_problems(NETS, 2)) if "delta nets" in told]


def test_the_policy_samples_with_local_layers_alone(monkeypatch):
    monkeypatch.setattr(type(CUDA), "total_memory_bytes", lambda self: 1 << 36)
    monkeypatch.setattr(ModelConfig, "uses_transformer_engine", lambda self, device: True)
    assert not list(device_problems(ARCH, RolloutConfig(), MODEL, CUDA))
    (problem,) = device_problems(ARCH, RolloutConfig(engine="megatron"), MODEL, CUDA)
    assert "Set model.layer_spec=local" in str(problem)


@pytest.mark.parametrize(("platform", "name"), [(CPU, "machine"), (CUDA, "GPU")])
def test_a_cache_beyond_the_memory_is_refused(monkeypatch, platform, name):
    monkeypatch.setattr(type(platform), "total_memory_bytes", lambda self: 1024 << 20)
    fits, too_large = RolloutConfig(kv_cache_mib=1024), RolloutConfig(kv_cache_mib=1025)
    assert not list(device_problems(ARCH, fits, MODEL, platform))
    (problem,) = device_problems(ARCH, too_large, MODEL, platform)
    assert str(problem).startswith(f"rollout.kv_cache_mib=1025: the {name} has 1024 MiB of memory")


@pytest.mark.parametrize(
    ("name", "value", "on_a_gpu", "way_out"),
    [
        ("VLLM_CPU_KVCACHE_SPACE", "4", False, "and set rollout.kv_cache_mib=4096"),
        ("VLLM_CPU_KVCACHE_SPACE", "a lot", False, "(unset VLLM_CPU_KVCACHE_SPACE)"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "1", True, "(unset VLLM_ENABLE_V1_MULTIPROCESSING)"),
    ],
)
def test_a_variable_by_which_vllm_overrules_settings_is_refused(
    monkeypatch, name, value, on_a_gpu, way_out
):
    for platform in (CPU, CUDA):
        monkeypatch.setattr(type(platform), "total_memory_bytes", lambda self: 1 << 36)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert not list(device_problems(ARCH, RolloutConfig(), MODEL, CPU))
    monkeypatch.setenv(name, value)
    (problem,) = device_problems(ARCH, RolloutConfig(), MODEL, CPU)
    assert f"the environment has {name}={value}" in problem
    assert problem.endswith(way_out)
    assert len(list(device_problems(ARCH, RolloutConfig(), MODEL, CUDA))) == on_a_gpu
    assert not list(device_problems(ARCH, RolloutConfig(engine="megatron"), MODEL, CPU))


def test_routing_can_be_replayed_of_a_mixture_and_by_an_engine_that_tells(monkeypatch):
    for platform in (CPU, CUDA):
        monkeypatch.setattr(type(platform), "total_memory_bytes", lambda self: 1 << 36)
    mixture = MixtureArch(num_experts=8, ffn_hidden_size=64, top_k=2, renormalized=True)
    experts = replace(ARCH, mixture=mixture)
    alone = RolloutConfig(routing_replay=True)
    shared = RolloutConfig(routing_replay=True, tensor_model_parallel_size=2)
    assert not list(device_problems(experts, alone, MODEL, CPU))
    assert not list(device_problems(experts, shared, MODEL, CPU))
    assert not list(device_problems(experts, alone, MODEL, CUDA))
    (problem,) = device_problems(experts, shared, MODEL, CUDA)
    assert str(problem).endswith(
        "Set rollout.tensor_model_parallel_size=1 or set rollout.routing_replay=false"
    )
    (problem,) = device_problems(ARCH, alone, MODEL, CPU)
    assert "has no effect: the model has no experts" in str(problem)
