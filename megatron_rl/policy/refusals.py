"""What a prompt that stands once for several responses cannot go with."""

from collections.abc import Iterator
from typing import Literal

from megatron_rl.errors import ConfigError
from megatron_rl.megatron.auxiliary import auxiliary_losses
from megatron_rl.megatron.config import ModelConfig
from megatron_rl.parallel.config import ParallelConfig

FIELD, WAY_OUT = "batching.share_prompts", "Set batching.share_prompts=false"


def sharing_problems(
    parallel: ParallelConfig, model: ModelConfig, most_responses: int, *, replays_routing: bool
) -> Iterator[ConfigError]:
    """Why prompts cannot be shared; most_responses: of a prompt that reach an update."""
    if parallel.context_parallel_size > 1:
        rule = "cannot be split over context-parallel ranks"
        yield ConfigError(FIELD, True, rule, f"{WAY_OUT}, or set parallel.context_parallel_size=1")
    of_routers = auxiliary_losses(model.megatron)
    if of_routers or of_routers.bias_rate:
        rule = "would count a prompt once for the routers' balance, which counts it once a response"
        yield ConfigError(FIELD, True, rule, WAY_OUT)
    if replays_routing:
        rule = "would route a prompt once, and the engine routed it for each response"
        yield ConfigError(FIELD, True, rule, f"{WAY_OUT}, or set rollout.routing_replay=false")
    if most_responses == 1:
        yield ConfigError(FIELD, True, "has no effect with one response a prompt", WAY_OUT)


def layer_spec_problems(
    shares: bool | Literal["auto"], model: ModelConfig, device_type: str
) -> Iterator[ConfigError]:
    """Why the layers that this device gives a model cannot share prompts, if that is asked for."""
    if shares is True and model.uses_transformer_engine(device_type):
        rule = "needs local layers: Transformer Engine's see all that stands before in a sequence"
        yield ConfigError(FIELD, True, rule, f"{WAY_OUT}, or set model.layer_spec=local")
