"""vLLM as a run uses it: a tiny model with random weights, and a few tokens of it."""

import importlib.util
import json
import tempfile
from pathlib import Path

import torch

from megatron_rl.doctor.check import Result, failed, ok, warning
from megatron_rl.doctor.versions import VLLM, VLLM_PACKAGES, install_command, version_of, vllm_pin
from megatron_rl.parallel.groups import init_distributed, make_groups
from megatron_rl.parallel.layout import Layout
from megatron_rl.platforms.base import Platform, detect
from megatron_rl.rollout.config import RolloutConfig
from megatron_rl.rollout.engine import Request, Response
from megatron_rl.rollout.vllm_engine import VllmEngine
from megatron_rl.weights.families.registry import read_model_config

NUM_TOKENS = 8
MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 64, which every device of vLLM's has kernels for
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}


def check_vllm() -> Result:
    platform = detect()
    remedy = install_command(vllm_pin())
    version = next(filter(None, map(version_of, VLLM_PACKAGES)), None)
    if importlib.util.find_spec("vllm") is None or version is None:
        told = "not installed: the policy itself samples (rollout.engine=megatron)"
        return warning(told, remedy)
    responses = _sample(platform)
    wrong = [_problem(response) for response in responses]
    if problems := list(filter(None, wrong)):
        return failed(f"{version} starts, and {problems[0]}", remedy)
    text = f"{version} on {platform.device_type} sampled {NUM_TOKENS} tokens of a tiny model"
    if version.partition("+")[0] != VLLM:
        return warning(f"{text}; only {VLLM} was tested", remedy)
    return ok(f"{text}, tested")


def _sample(platform: Platform) -> list[Response]:
    """Two responses to two prompts, by the engine of a run."""
    init_distributed(platform)
    groups = make_groups(
        platform, Layout(world_size=1, tp=1, pp=1), 1, tensor_parallel=None, context_parallel=None
    )
    is_cpu = platform.device_type == "cpu"
    with tempfile.TemporaryDirectory(prefix="megatron_rl-doctor-") as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        engine = VllmEngine(
            Path(folder),
            read_model_config(Path(folder), []),
            RolloutConfig(max_num_seqs=4, kv_cache_mib=64, enforce_eager=True),
            groups,
            dtype=torch.float32 if is_cpu else torch.bfloat16,
            max_model_len=64,
            eos_ids=[],
            load_weights=False,
        )
        responses: list[Response] = []
        engine.generate([_request(key) for key in (0, 1)], responses.append, lambda: True)
    return responses


def _request(key: int) -> Request:
    return Request(
        key=(key, 0),
        prompt_tokens=(5, 7 + key, 11),
        temperature=1.0,
        max_tokens=NUM_TOKENS,
        seed=key,
    )


def _problem(response: Response) -> str | None:
    if len(response.tokens) != NUM_TOKENS:
        return f"gave {len(response.tokens)} of {NUM_TOKENS} tokens"
    is_fine = response.logprobs.isfinite() & (response.logprobs <= 0)
    return None if bool(is_fine.all()) else f"has log-probs {response.logprobs.tolist()}"
