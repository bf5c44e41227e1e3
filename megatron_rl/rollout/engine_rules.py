"""What an engine cannot do, and what settings mean where the policy itself samples."""

from collections.abc import Iterator

from megatron_rl.errors import ConfigError
from megatron_rl.evaluation.config import EvaluationConfig
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.rollout.config import LEAST_TEMPERATURE, RolloutConfig
from megatron_rl.weights.config import WeightSyncConfig

OWN = "rollout.engine=megatron is the policy itself"


def engine_problems_of(
    rollout: RolloutConfig, model: ModelConfig, optimizer: OptimizerConfig
) -> Iterator[ConfigError]:
    """Settings of another engine, which the policy as an engine cannot follow."""
    if rollout.engine != "megatron":
        return
    if rollout.dtype not in ("model", model.dtype):
        yield ConfigError(
            "rollout.dtype",
            rollout.dtype,
            f"{OWN}, in its own dtype",
            "Set rollout.dtype=model, or set rollout.engine=vllm",
        )
    if rollout.tensor_model_parallel_size > 1:
        yield ConfigError(
            "rollout.tensor_model_parallel_size",
            rollout.tensor_model_parallel_size,
            f"{OWN}, as parallel.tensor_model_parallel_size splits it",
            "Set rollout.tensor_model_parallel_size=1",
        )
    if optimizer.offload == "weights":
        yield ConfigError(
            "optimizer.offload",
            "weights",
            f"{OWN}, which generates with these weights",
            "Set optimizer.offload=optimizer, or set rollout.engine=vllm",
        )
    if model.layer_spec == "transformer_engine":
        yield te_problem("model.layer_spec", model.layer_spec)


def sampling_problems(
    rollout: RolloutConfig, evaluation: EvaluationConfig, *, is_supervised: bool
) -> Iterator[ConfigError]:
    """Distributions that the engine or the trainer does not have."""
    yield from _truncation_problems("rollout", rollout.top_k, rollout.top_p)
    yield from _truncation_problems("evaluation", evaluation.top_k, evaluation.top_p)
    if evaluation.temperature == 0 and evaluation.top_k > 0:
        yield ConfigError(
            "evaluation.top_k",
            evaluation.top_k,
            "has no effect at temperature 0, which takes the most probable token",
            "Set evaluation.top_k=-1 evaluation.top_p=1, or set evaluation.temperature=1",
        )
    if is_supervised and rollout.top_k > 0:
        yield ConfigError(
            "rollout.top_k",
            rollout.top_k,
            "nothing is sampled",
            "Set rollout.top_k=-1 rollout.top_p=1",
        )
    if 0 < evaluation.temperature < LEAST_TEMPERATURE:
        yield ConfigError(
            "evaluation.temperature",
            evaluation.temperature,
            f"vLLM would sample at {LEAST_TEMPERATURE}",
            "Set evaluation.temperature=0 for greedy sampling, or set "
            f"evaluation.temperature={LEAST_TEMPERATURE}, or more",
        )
    if is_supervised and rollout.temperature != 1:
        yield ConfigError(
            "rollout.temperature",
            rollout.temperature,
            "nothing is sampled, and log-probs at another temperature than 1 would "
            "train another model than the one that is used",
            "Set rollout.temperature=1",
        )


def _truncation_problems(section: str, top_k: int, top_p: float) -> Iterator[ConfigError]:
    if top_k == 0:
        yield ConfigError(
            f"{section}.top_k",
            top_k,
            "tokens are drawn from none",
            f"Set {section}.top_k=-1 for the whole vocabulary, or to 1 or more",
        )
    elif top_p < 1 and top_k < 0:
        yield ConfigError(
            f"{section}.top_p",
            top_p,
            "needs a top_k, which bounds what is kept of every token that it was drawn from",
            f"Set {section}.top_k=100, or set {section}.top_p=1",
        )


def routing_problems(
    rollout: RolloutConfig, model: ModelConfig, *, is_supervised: bool
) -> Iterator[ConfigError]:
    """Why the engine's choice of experts cannot be told, or cannot be followed."""
    field, way_out = "rollout.routing_replay", "Set rollout.routing_replay=false"
    if not rollout.routing_replay:
        return
    if is_supervised:
        yield ConfigError(field, True, "nothing is sampled", way_out)
    if model.megatron.get("moe_router_fusion"):
        rule = (
            "Transformer Engine's router, which model.megatron.moe_router_fusion asks for, "
            "chooses by itself"
        )
        yield ConfigError(field, True, rule, way_out)
    if rollout.engine == "megatron":
        rule = f"{OWN}, whose router chooses alike when it samples and when it trains"
        yield ConfigError(field, True, rule, way_out)


def te_problem(field: str, value: object) -> ConfigError:
    """Layers that keep no keys and values here."""
    return ConfigError(
        field,
        value,
        "rollout.engine=megatron keeps keys and values in the attention of local layers alone",
        "Set model.layer_spec=local, or set rollout.engine=vllm",
    )


def unused_by_policy(rollout: RolloutConfig, weights: WeightSyncConfig) -> Iterator[str]:
    """A line for settings that have nothing to set where the policy samples."""
    names = [
        f"weights.{name}={getattr(weights, name)}"
        for name, field in type(weights).model_fields.items()
        if getattr(weights, name) != field.default
    ]
    if rollout.enforce_eager:
        names.append("rollout.enforce_eager=true")
    if rollout.engine == "megatron" and names:
        has = "has" if len(names) == 1 else "have"
        yield f"{', '.join(names)} {has} no effect: {OWN}, with no sync and no CUDA graphs"
