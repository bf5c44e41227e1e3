"""Layouts that the rollout engine cannot have, found before anything is built."""

import os
from collections.abc import Iterator

from megatron_rl.errors import ConfigError
from megatron_rl.evaluation.config import EvaluationConfig
from megatron_rl.megatron.config import ModelConfig
from megatron_rl.parallel.refusals import split_problems
from megatron_rl.platforms.base import Platform
from megatron_rl.rollout.config import RolloutConfig
from megatron_rl.rollout.engine_rules import te_problem
from megatron_rl.weights.arch import LatentArch, ModelArch, padded_vocab_size

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of an attention head that vLLM 0.32 has code for on a CPU."""

CPU_LATENT = (512, 64)
"""Size of the latent vector, and turning entries of keys, that it has code for there."""

CACHE_SPACE, OTHER_PROCESS = "VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING"
"""Environment variables by which vLLM overrules what it is told."""


def engine_problems(arch: ModelArch, rollout_tp: int) -> Iterator[ConfigError]:
    """Why vLLM cannot split this model; it would say so itself, after minutes."""
    rows = (
        ("attention heads", arch.num_attention_heads),
        *arch.normed_rows,
        *arch.dense_rows,
        *arch.expert_rows,
        *arch.delta_heads,
        ("rows of the padded vocabulary", padded_vocab_size(arch.vocab_size, 1)),
    )
    field = "rollout.tensor_model_parallel_size"
    yield from split_problems(field, rollout_tp, rows, arch.num_query_groups)


def device_problems(
    arch: ModelArch, rollout: RolloutConfig, model: ModelConfig, platform: Platform
) -> Iterator[ConfigError | str]:
    """Why the engine cannot run this model on the device of this rank."""
    is_cpu, is_policy = platform.device_type == "cpu", rollout.engine == "megatron"
    if (
        is_policy
        and model.layer_spec == "auto"
        and model.uses_transformer_engine(platform.device_type)
    ):
        yield te_problem("model.layer_spec", "auto")
    if is_cpu and not is_policy and arch.delta is not None:
        yield (
            "model.path: it has gated delta nets, which vLLM 0.32 runs on a CPU in bfloat16 alone, "
            "with weights in an order of its own. Set rollout.engine=megatron"
        )
    elif is_cpu and not is_policy and arch.latent is not None:
        yield from _latent_problems(arch.latent)
    elif is_cpu and not is_policy and arch.head_dim not in CPU_HEAD_DIMS:
        yield (
            f"model.path: its attention heads have {arch.head_dim} elements (head_dim, or "
            "hidden_size / num_attention_heads): on a CPU vLLM has "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}. Use another model or a GPU, or set "
            "rollout.engine=megatron"
        )
    if not is_policy:
        yield from _environment_problems(is_cpu=is_cpu)
    if rollout.routing_replay:
        yield from _replay_problems(arch, rollout, is_cpu=is_cpu)
    total = platform.total_memory_bytes()
    if rollout.kv_cache_mib is not None and rollout.kv_cache_mib << 20 > total:
        yield ConfigError(
            "rollout.kv_cache_mib",
            rollout.kv_cache_mib,
            f"the {'machine' if is_cpu else 'GPU'} has {total >> 20} MiB of memory",
            "Set rollout.kv_cache_mib=null, or lower it",
        )


def evaluation_problems(
    rollout: RolloutConfig, evaluation: EvaluationConfig, platform: Platform
) -> Iterator[ConfigError]:
    """vLLM on a GPU tells what tokens are drawn from of all requests or of none, and never of all
    the vocabulary; of an engine of its own, so that the policy as the engine has no such bounds.
    """
    is_asked = bool(evaluation.benchmarks) and rollout.is_truncated
    if not is_asked or rollout.engine == "megatron" or platform.device_type == "cpu":
        return
    way_out = "set rollout.top_k=-1 rollout.top_p=1 or set rollout.engine=megatron"
    rule = "vLLM on a GPU, asked for the tokens that rollout.top_k leaves, samples"
    if evaluation.temperature == 0:
        yield ConfigError(
            "evaluation.temperature",
            evaluation.temperature,
            f"{rule} nothing greedily",
            f"Set evaluation.temperature=1, {way_out}",
        )
    elif evaluation.top_k < 0:
        yield ConfigError(
            "evaluation.top_k",
            evaluation.top_k,
            f"{rule} from no whole vocabulary",
            f"Set evaluation.top_k={rollout.top_k}, {way_out}",
        )


def _environment_problems(*, is_cpu: bool) -> Iterator[str]:
    gib = os.environ.get(CACHE_SPACE, "")
    if is_cpu and gib:
        size = f", and set rollout.kv_cache_mib={int(gib) * 1024}" if gib.isdecimal() else ""
        yield (
            f"the environment has {CACHE_SPACE}={gib}, which vLLM takes in the place of "
            f"rollout.kv_cache_mib. Unset it (unset {CACHE_SPACE}){size}"
        )
    if os.environ.get(OTHER_PROCESS, "0") != "0":
        yield (
            f"the environment has {OTHER_PROCESS}={os.environ[OTHER_PROCESS]}: vLLM's engine would "
            "be another process, and weights are handed over within this one. Unset it (unset "
            f"{OTHER_PROCESS})"
        )


def _latent_problems(latent: LatentArch) -> Iterator[str]:
    if (latent.rank, latent.turning_dim) != CPU_LATENT:
        yield (
            f"model.path: its latent attention has kv_lora_rank={latent.rank} and qk_rope_head_dim="
            f"{latent.turning_dim}: on a CPU vLLM has {CPU_LATENT[0]} and {CPU_LATENT[1]} alone. "
            "Use another model or a GPU, or set rollout.engine=megatron"
        )


def _replay_problems(
    arch: ModelArch, rollout: RolloutConfig, *, is_cpu: bool
) -> Iterator[ConfigError]:
    field = "rollout.routing_replay"
    if arch.mixture is None:
        yield ConfigError(
            field, True, "has no effect: the model has no experts", f"Set {field}=false"
        )
    elif rollout.tensor_model_parallel_size > 1 and not is_cpu:
        yield ConfigError(
            field,
            True,
            "on a GPU vLLM 0.32 tells the first rank of an engine alone which experts it chose",
            f"Set rollout.tensor_model_parallel_size=1 or set {field}=false",
        )
