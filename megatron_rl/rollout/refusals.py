"""Layouts that the rollout engine cannot have, found before anything is built."""

from collections.abc import Iterator

from megatron_rl.errors import ConfigError
from megatron_rl.weights.arch import ModelArch, padded_vocab_size


def engine_problems(arch: ModelArch, rollout_tp: int) -> Iterator[ConfigError]:
    """Why vLLM cannot split this model; it would say so itself, after minutes."""
    field = "rollout.tensor_model_parallel_size"
    padded_vocab = padded_vocab_size(arch.vocab_size, 1)
    for what, count in (
        ("attention heads", arch.num_attention_heads),
        *arch.dense_rows,
        *arch.expert_rows,
        ("rows of the padded vocabulary", padded_vocab),
    ):
        if count % rollout_tp:
            yield ConfigError(
                field, rollout_tp, f"must divide the model's {count} {what}", "Choose a divisor"
            )
    groups = arch.num_query_groups
    if groups % rollout_tp and rollout_tp % groups:
        yield ConfigError(
            field,
            rollout_tp,
            f"must divide the model's {groups} key/value heads or be a multiple of them",
            "Choose such a size",
        )
