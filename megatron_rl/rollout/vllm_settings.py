"""Whether vLLM's engine is set as it was told to be."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from megatron_rl.errors import RunError

PLACES = {
    "tensor_parallel_size": "parallel_config.tensor_parallel_size",
    "dtype": "model_config.dtype",
    "max_model_len": "model_config.max_model_len",
    "logprobs_mode": "model_config.logprobs_mode",
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "kv_cache_memory_bytes": "cache_config.kv_cache_memory_bytes",
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
}
"""What responses, log-probs or memory depend on, and where vLLM's configuration has it."""


def refuse_overruled(settings: Mapping[str, Any], vllm_config: Any) -> None:
    """Raise a RunError where the engine has other values, and name all of them.

    vLLM has environment variables and plugins by which it sets aside what it was told, and says so
    at most in its log.
    """
    overruled = []
    for name in PLACES.keys() & settings.keys():
        told, has = _text(settings[name]), _text(attrgetter(PLACES[name])(vllm_config))
        if told != has:
            overruled.append(f"{name}={has} in the place of {told}")
    if overruled:
        raise RunError(
            f"rollout.engine=vllm: vLLM has taken {', '.join(sorted(overruled))}. Look for what "
            "tells it so among its environment variables (env | grep VLLM) and plugins, or set "
            "rollout.engine=megatron"
        )


def _text(value: object) -> str:
    return str(value).removeprefix("torch.")
