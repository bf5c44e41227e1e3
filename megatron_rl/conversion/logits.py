"""The logits of a model on the CPU in float32, computed by transformers or by Megatron-Core.

A Hugging Face directory goes through transformers and a Megatron-Core checkpoint through the model
that we train. So a comparison of one with the other compares the networks too, not only the files.
"""

import functools
import gc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.batching.pack import pack
from megatron_rl.errors import InputError
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.groups import join
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import Groups, init_distributed
from megatron_rl.platforms.base import CPU
from megatron_rl.prompts.tokenizer import load_tokenizer
from megatron_rl.types import MicroBatch, Sample
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.model_source import ModelSource

if TYPE_CHECKING:
    from megatron_rl.policy.policy import Policy

TEXT = (
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? From 9:40 to "
    "13:00 are 3 hours and 20 minutes, and 5 more minutes make 3 hours and 25 minutes, or 205 "
    "minutes in all. Let f(x) = 3x^2 - 4x + 1; then f(2) = 12 - 8 + 1 = 5, so the answer is "
    '\\boxed{5}. She wrote: "The rest is easy", closed the book, and went out into the rain.\n'
    "def area(width, height):\n    return width * height\n"
)

# transformers has 1e-6 there whatever config.json says; Megatron-Core and vLLM have rms_norm_eps.
NORMS_OF_LATENTS = ("q_a_layernorm", "kv_a_layernorm")


def tokens_of(source: ModelSource, arch: ModelArch, text: str | None) -> Tensor:
    """[T] int64 ids of a text (None: of TEXT), cut where the model's positions end."""
    ids = load_tokenizer(source.config_dir).encode(text or TEXT)
    ids = ids[: arch.max_position_embeddings]
    if not ids or max(ids) >= arch.vocab_size:
        raise InputError(
            f"{source.config_dir}: its tokenizer gives {len(ids)} ids up to {max(ids, default=0)}, "
            f"and the embedding has {arch.vocab_size} rows. They are not of the same model"
        )
    return torch.tensor(ids)


@torch.no_grad()
def logits_of(source: ModelSource, arch: ModelArch, tokens: Tensor) -> Tensor:
    """[T, V] float32 logits of the next token after each."""
    if source.megatron_dir is None:
        logits = _by_transformers(source, tokens)
    else:
        logits = _by_megatron(source, arch, tokens)
    gc.collect()  # the next model may need the memory
    return logits


def _by_transformers(source: ModelSource, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source.config_dir,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    for name, module in model.named_modules():
        if name.endswith(NORMS_OF_LATENTS):
            module.variance_epsilon = model.config.rms_norm_eps
    logits: Tensor = model(tokens[None], use_cache=False).logits[0]
    return logits


def _by_megatron(source: ModelSource, arch: ModelArch, tokens: Tensor) -> Tensor:
    policy = _policy(source, arch)
    policy.load(source)
    collected: list[Tensor] = []

    def measure(hidden: Tensor, batch: MicroBatch) -> Tensor:
        collected.append(hidden[:, 0] @ policy.head_weight[: arch.vocab_size].T)
        return hidden.sum()

    policy.forward([_row(tokens)], measure)
    return collected[0]


def _policy(source: ModelSource, arch: ModelArch) -> "Policy":
    groups = _one_rank()

    from megatron_rl.policy.policy import Policy  # imports Megatron-Core, adapted by then

    model = ModelConfig(path=str(source.megatron_dir), dtype="float32", layer_spec="local")
    return Policy(
        arch, model, ParallelConfig(), OptimizerConfig(), groups, temperature=1.0, run_updates=1
    )


@functools.cache
def _one_rank() -> Groups:
    init_distributed(CPU)
    return join(CPU, ParallelConfig(), rollout_tp=1)


def _row(tokens: Tensor) -> MicroBatch:
    """A packed row of one sequence, of which no token carries loss."""
    sample = Sample(
        group_id=0,
        index=0,
        update=0,
        prompt_tokens=tokens,
        response_tokens=tokens[:0],
        advantage=0.0,
    )
    return pack(
        [sample], weight_of=lambda _: 0.0, multiple=1, dtype=torch.float32, device=tokens.device
    )
