"""Imported once by the server that ranks fork from: vLLM, which takes longest of all."""

import gc
import os

from megatron_rl.rollout.vllm_engine import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # vLLM reads it when it is imported

import preload_megatron  # noqa: F401  # isort: split
import vllm.entrypoints.llm
import vllm.model_executor.layers.quantization.online.base
import vllm.model_executor.models.llama
import vllm.model_executor.models.qwen2
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401

import megatron_rl.build  # noqa: F401

gc.freeze()  # else every rank's collector looks through what imports made, and copies its pages
