"""Greedy tokens by vLLM, in a process of its own: a second engine in one process fails."""

import os
from pathlib import Path

from megatron_rl.rollout.vllm_engine import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # vLLM reads it when it is imported

import torch

NEW_TOKENS = 24


def generate(model_dir: Path, prompts: list[list[int]], out: Path) -> None:
    """(ids, their log-probs) of each prompt to the file `out`."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(model_dir),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=True,
        seed=0,
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    outputs = [request.outputs[0] for request in found]
    result = [
        (list(o.token_ids), [next(iter(step.values())).logprob for step in o.logprobs])
        for o in outputs
    ]
    torch.save(result, out)
    os._exit(0)  # destructors may wait for what is gone
