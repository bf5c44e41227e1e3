"""`rollout.engine: auto`: which engine samples, and why.

The recipe, the model and the device decide, so every rank and every start of a run come to the same
answer. A run that goes on keeps its engine.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from megatron_rl.checkpoint.contract import newest_terms
from megatron_rl.checkpoint.names import CHECKPOINTS
from megatron_rl.config import RunConfig
from megatron_rl.errors import InputError
from megatron_rl.fit import changed_in
from megatron_rl.platforms.base import detect
from megatron_rl.rollout.engine_rules import engine_problems_of, routing_problems
from megatron_rl.rollout.refusals import device_problems, engine_problems
from megatron_rl.rollout.separate_rules import separate_problems
from megatron_rl.weights.arch import ModelArch
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model

EngineName = Literal["vllm", "megatron"]
OTHER: dict[EngineName, EngineName] = {"vllm": "megatron", "megatron": "vllm"}

DIFFER = (
    "ranks would sample in different ways. Install the same packages on all machines, or name the "
    "engine: rollout.engine=megatron"
)
"""Why ranks must not choose different engines, and the way out."""

IN_16_BITS = ("bfloat16", "float16")
"""Dtypes in which the policy as the engine has not been measured on a CPU."""

MOST_PARAMETERS = 200_000_000
"""Of a model with which the policy samples on a CPU; benchmarks/results/engine.md."""


def with_engine(
    config: RunConfig, device_type: str, say: Callable[[str], None], *, is_here: bool = True
) -> RunConfig:
    """The recipe with an engine in the place of `auto`, which is said with the reason.

    A run that trains from recorded rollouts has the engine that such a run would sample with, since
    old log-probs may be those of samples; it builds none.
    Where the model cannot be read, either one will do: what reads all inputs says why.

    Args:
        is_here: False: the recipe is planned for another machine.
    """
    if config.rollout.engine != "auto" or config.is_supervised:
        return config
    engine, reason = choose_engine(config, device_type, is_here=is_here)
    if reason and config.has_engine:
        say(f"engine: {engine}, {reason}")
    return changed_in(config, "rollout", engine=engine)


def choose_engine(config: RunConfig, device_type: str, *, is_here: bool) -> tuple[EngineName, str]:
    """The engine and a clause that says why; no clause where the model cannot be read."""
    try:
        source = find_model(config.model.path, "model.path")
        arch = read_model_config(source.config_dir, config.model.ignore_config_fields)
    except InputError:
        return "megatron", ""
    refused = {engine: _refusals(config, arch, engine, is_here=is_here) for engine in OTHER}
    for engine, other in OTHER.items():
        if not refused[engine] and refused[other]:
            return engine, f"since the other one refuses {refused[other][0]}"
    if is_here and importlib.util.find_spec("vllm") is None:
        return "megatron", "since vLLM is not installed"
    engine, reason = _former(config) or _by_device(config, arch, device_type)
    return engine, f"{reason}. rollout.engine={OTHER[engine]} is the other one"


def _by_device(config: RunConfig, arch: ModelArch, device_type: str) -> tuple[EngineName, str]:
    if device_type != "cpu":
        return "vllm", "since it is for GPUs"
    if config.engine_dtype in IN_16_BITS:
        return "vllm", f"since it is in {config.engine_dtype}"
    told = f"since on a CPU a model of {arch.num_parameters:,} parameters"
    if arch.num_parameters <= MOST_PARAMETERS:
        return "megatron", f"{told} samples by itself, as all up to {MOST_PARAMETERS:,} do"
    return "vllm", f"{told} has more than the {MOST_PARAMETERS:,} up to which it would by itself"


def _refusals(
    config: RunConfig, arch: ModelArch, engine: EngineName, *, is_here: bool
) -> list[str]:
    """What a start with this engine would refuse, in its words, without the ways out."""
    changed = changed_in(config, "rollout", engine=engine)
    rollout, model = changed.rollout, changed.model
    found: list[Any] = [
        *engine_problems_of(rollout, model, changed.optimizer),
        *routing_problems(rollout, model, is_supervised=changed.is_supervised),
        *separate_problems(rollout, changed.parallel, lag=changed.run.lag, has_engine=True),
    ]
    if engine == "vllm":
        found += engine_problems(arch, rollout.tensor_model_parallel_size)
    if is_here:
        found += device_problems(arch, rollout, model, detect())
    return [str(problem).rpartition(". ")[0] for problem in found]


def _former(config: RunConfig) -> tuple[EngineName, str] | None:
    """The engine of the checkpoint that the run goes on from."""
    if config.run.resume == "never":
        return None
    found = newest_terms(Path(config.run.output_dir) / CHECKPOINTS)
    recipe = None if found is None else found[0].recipe
    engine = None if recipe is None else recipe.get("rollout", {}).get("engine")
    if found is None or engine not in OTHER:
        return None
    return engine, f"as in {Path(found[0].where).name}"
