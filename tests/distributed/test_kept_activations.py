"""The bytes that a forward pass keeps are those that megatron/activations.py counts from sizes.

torch itself tells which tensors it saves; what is counted are the bytes of their memory, each once.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from harness import run_on_ranks

from megatron_rl.megatron import faults
from megatron_rl.megatron.activations import Activations
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.platforms.base import CPU
from megatron_rl.weights.arch import DeltaArch, LatentArch, MixtureArch, ModelArch

SEQUENCES, LENGTH, PROMPT = 8, 64, 8  # of one length, so that none is padded
VOCAB = 128
PLAIN = ModelArch(
    model_type="qwen2",
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=VOCAB,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling_factor=None,
    max_position_embeddings=256,
    qkv_bias=True,
    tied_embeddings=True,
)
HEAD_NORMS = replace(PLAIN, qk_norm=True, qkv_bias=False, head_dim=32)
BEHIND = replace(
    HEAD_NORMS,
    model_type="olmo2",
    wide_qk_norm=True,
    norms_behind=True,
    turns_in_float32=True,
)
EXPERTS = replace(
    PLAIN,
    mixture=MixtureArch(num_experts=8, ffn_hidden_size=80, top_k=2, renormalized=True),
)
HALF = replace(EXPERTS, mixture=replace(EXPERTS.mixture, dense_layers=frozenset({0, 2})))
LATENT = replace(
    PLAIN,
    model_type="deepseek_v3",
    num_query_groups=4,
    qkv_bias=False,
    head_dim=28,
    rotary_dim=8,
    latent=LatentArch(
        rank=40, query_rank=24, still_dim=20, turning_dim=8, value_dim=16, interleaved=True
    ),
)
NETS = replace(
    PLAIN,
    model_type="qwen3_5_text",
    qkv_bias=False,
    qk_norm=True,
    head_dim=32,
    rotary_dim=8,
    delta=DeltaArch(
        attention_layers=frozenset({1}),
        num_key_heads=2,
        num_value_heads=4,
        key_dim=24,
        value_dim=40,
        kernel=4,
    ),
)
GATED = replace(
    NETS,
    model_type="qwen3_5_moe_text",
    mixture=replace(EXPERTS.mixture, shared_ffn_hidden_size=40, has_shared_gate=True),
)
TP2 = {"tensor_model_parallel_size": 2}
CASES: dict[str, tuple[ModelArch, str, dict[str, Any]]] = {
    "plain": (PLAIN, "float32", {}),
    "in float64": (PLAIN, "float64", {}),
    "in bfloat16": (PLAIN, "bfloat16", {}),
    "norms of heads": (HEAD_NORMS, "float32", {}),
    "norms of heads in bfloat16": (HEAD_NORMS, "bfloat16", {}),
    "norms behind": (BEHIND, "float32", {}),
    "norms behind in bfloat16": (BEHIND, "bfloat16", {}),
    "norms behind, TP 2, sequence parallel": (
        BEHIND,
        "float32",
        {**TP2, "sequence_parallel": True},
    ),
    "experts": (EXPERTS, "float32", {}),
    "experts in bfloat16": (EXPERTS, "bfloat16", {}),
    "experts in every second layer": (HALF, "float32", {}),
    "experts, TP 2, sequence parallel": (EXPERTS, "float32", {**TP2, "sequence_parallel": True}),
    "experts over two ranks of TP 2": (
        EXPERTS,
        "float32",
        {
            **TP2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "latent attention": (LATENT, "float32", {}),
    "latent attention in bfloat16": (LATENT, "bfloat16", {}),
    "latent attention, TP 2, sequence parallel": (
        LATENT,
        "float32",
        {**TP2, "sequence_parallel": True},
    ),
    "TP 2": (PLAIN, "float32", TP2),
    "TP 2, sequence parallel": (PLAIN, "float32", {**TP2, "sequence_parallel": True}),
}
if not faults.is_present("packed_delta_nets"):
    CASES |= {
        "delta nets": (NETS, "float32", {}),
        "delta nets in bfloat16": (NETS, "bfloat16", {}),
        "delta nets, TP 2, sequence parallel": (
            NETS,
            "float32",
            {**TP2, "sequence_parallel": True},
        ),
        "delta nets, a gate of an expert": (GATED, "float32", {}),
        "the same in bfloat16, TP 2, sequence parallel": (
            GATED,
            "bfloat16",
            {**TP2, "sequence_parallel": True},
        ),
    }


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_that_layers_keep_are_counted_from_sizes(case):
    arch, dtype, layout = CASES[case]
    run_on_ranks(2 if layout else 1, compare, arch, dtype, layout)


def compare(arch: ModelArch, dtype: str, layout: dict[str, Any]) -> None:
    tokens = SEQUENCES * LENGTH
    model, parallel = ModelConfig(path="none", dtype=dtype), ParallelConfig(**layout)
    counted = Activations(
        arch=arch,
        model=model,
        parallel=parallel,
        device_type="cpu",
        itemsize={"float64": 8, "float32": 4, "bfloat16": 2}[dtype],
    ).kept(tokens, num_rows=1)
    kept = mean_over_ranks(kept_by_a_forward(arch, model, parallel))
    # Besides: the last norm, embedding and head, numbers of one per token, routing tables.
    assert 0.93 * kept < counted < 1.03 * kept, (counted / tokens, kept / tokens)


def mean_over_ranks(kept: int) -> float:
    """Experts of one rank may have more tokens than those of another."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(kept))
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def kept_by_a_forward(arch: ModelArch, model: ModelConfig, parallel: ParallelConfig) -> int:
    """Bytes that torch keeps of one row, but for weights, the last norm and what follows it."""
    import preload_megatron  # noqa: F401
    import torch
    from torch.utils.checkpoint import checkpoint

    from megatron_rl.megatron.groups import join
    from megatron_rl.policy.policy import Policy

    policy = Policy(
        arch,
        model,
        parallel,
        OptimizerConfig(),
        join(CPU, parallel, 1),
        temperature=1.0,
        run_updates=1,
    )
    with torch.no_grad():
        for parameter in policy.named_parameters().values():
            parameter.normal_(0.0, 0.1)
    policy.prepare_training()
    weights = {
        parameter.untyped_storage().data_ptr()
        for chunk in policy.chunks
        for parameter in chunk.parameters()
    }
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout == torch.strided:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def checkpointed(work: Any, *inputs: torch.Tensor, **settings: Any) -> Any:
        for tensor in inputs:  # which it holds by itself
            note(tensor)
        return checkpoint(work, *inputs, **settings)

    with ExitStack() as stack:
        if arch.delta is not None:
            from megatron_rl.megatron import delta_net

            stack.enter_context(mock.patch.object(delta_net, "checkpoint", checkpointed))
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        stack.enter_context(hooks)
        policy.backward([row(policy)], lambda hidden, batch: hidden.float().sum() * 0.0)
    return sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in saved.items()
        if address not in weights
    )


def row(policy: Any) -> Any:
    import torch

    from megatron_rl.batching.pack import pack
    from megatron_rl.types import Sample

    samples = [
        Sample(
            group_id=number,
            index=0,
            update=0,
            prompt_tokens=torch.arange(PROMPT),
            response_tokens=torch.randint(0, VOCAB, (LENGTH - PROMPT,)),
            advantage=1.0,
            rollout_logprobs=None,
        )
        for number in range(SEQUENCES)
    ]
    return pack(
        samples,
        weight_of=lambda sample: 1.0,
        multiple=1,
        dtype=torch.float64 if policy.dtype == torch.float64 else torch.float32,
        device=torch.device("cpu"),
    )
