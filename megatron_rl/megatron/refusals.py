"""Layouts and settings that would be wrong, each with its reason, found before anything is built.

With some of them stock Megatron-Core trains without an error and with wrong gradients; such a one
is refused where the installed version has the fault (faults.py).
"""

import difflib
from collections.abc import Iterable, Iterator

from megatron_rl.errors import ConfigError
from megatron_rl.megatron import faults
from megatron_rl.megatron.auxiliary import BIAS_RATE, FIELDS, LOSSES, auxiliary_problems
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.settable import DECIDED, FAULTY, OF_TE, REFUSED, VALUES
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.refusals import (
    auto_problems,
    divisors,
    nearest,
    split_problems,
    stage_problems,
    uneven_problems,
)
from megatron_rl.weights.arch import ModelArch


def config_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Problems of a layout, whatever the model."""
    if parallel.auto:
        yield from auto_problems(parallel)
        yield from _override_problems(model)
        return
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vpp, etp = parallel.virtual_pipeline_model_parallel_size, parallel.expert_tensor_parallel_size
    is_uneven = etp is not None and etp != tp and parallel.expert_model_parallel_size == 1
    if is_uneven and (reason := faults.reason("experts_of_smaller_tensor_parallelism")):
        yield ConfigError(
            "parallel.expert_tensor_parallel_size",
            etp,
            f"must equal tensor_model_parallel_size={tp} while expert_model_parallel_size is 1: "
            f"{reason}",
            "Set parallel.expert_tensor_parallel_size=null",
        )
    if (
        model.dtype == "float16"
        and parallel.expert_model_parallel_size > 1
        and (reason := faults.reason("loss_scales_apart"))
    ):
        yield ConfigError("model.dtype", "float16", reason, "Set model.dtype=bfloat16")
    if parallel.sequence_parallel and tp == 1:
        yield ConfigError(
            "parallel.sequence_parallel",
            True,
            "has no effect at tensor_model_parallel_size=1",
            "Set parallel.sequence_parallel=false, or use tensor parallelism",
        )
    if vpp is not None:
        yield from _interleaving_problems(model, pp, vpp)
    yield from uneven_problems(parallel)
    yield from _override_problems(model)


def _interleaving_problems(model: ModelConfig, pp: int, vpp: int) -> Iterator[ConfigError]:
    field = "parallel.virtual_pipeline_model_parallel_size"
    if pp == 1 or vpp < 2:
        yield ConfigError(
            field, vpp, f"has no effect at pipeline_model_parallel_size={pp}", f"Set {field}=null"
        )
    is_crossed = pp == 2 and model.megatron.get("overlap_p2p_comm") is False
    if is_crossed and (reason := faults.reason("interleaving_without_overlap")):
        yield ConfigError(
            "model.megatron.overlap_p2p_comm",
            False,
            reason,
            "Set model.megatron.overlap_p2p_comm=true, or set "
            "parallel.virtual_pipeline_model_parallel_size=null",
        )


def _override_problems(model: ModelConfig) -> Iterator[ConfigError]:
    if not model.megatron:
        return
    from megatron_rl.megatron.enter import config_fields  # it imports torch and Megatron-Core

    known = config_fields()
    for name, value in model.megatron.items():
        field = f"model.megatron.{name}"
        if name not in known and name not in ParallelConfig.model_fields:
            yield ConfigError(field, value, *_unknown(name, known))
        elif why_not := _why_not(name, model.layer_spec):
            yield ConfigError(field, value, f"cannot be set here: {why_not}", "Leave it out")
        elif name in VALUES and value not in VALUES[name][0]:
            allowed, reason = VALUES[name]
            yield ConfigError(field, value, reason, _one_of(field, allowed))
    yield from auxiliary_problems(model.megatron)


def _one_of(field: str, allowed: Iterable[object]) -> str:
    """The way out where a setting has a few values that work."""
    typed = (str(value).lower() if isinstance(value, bool) else str(value) for value in allowed)
    return "Set " + " or set ".join(f"{field}={value}" for value in typed)


def _why_not(name: str, layer_spec: str) -> str | None:
    """Why a field that Megatron-Core has cannot be set; None where it can."""
    if name not in DECIDED:
        return "no tested version of Megatron-Core has it, so nobody knows what it changes"
    if name in OF_TE and layer_spec == "local":
        return "local layers do not read it (model.layer_spec)"
    return REFUSED.get(name) or (faults.reason(FAULTY[name]) if name in FAULTY else None)


def _unknown(name: str, known: Iterable[str]) -> tuple[str, str]:
    """What is wrong with the name of a field that the installed version does not have; a hint."""
    version = faults.installed_version()
    if name in DECIDED:
        others = " and ".join(other for other in faults.SUPPORTED_VERSIONS if other != version)
        return f"Megatron-Core {version} has no such field, only {others} has", "Leave it out"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else "See Megatron-Core's TransformerConfig"
    return "TransformerConfig has no such field", hint


def optimizer_problems(
    dtype: str, section: str, optimizer: OptimizerConfig
) -> Iterator[ConfigError]:
    """Problems of the settings of one optimizer."""
    is_clipped = dtype == "float64" and optimizer.clip_grad > 0
    if is_clipped and (reason := faults.reason("clipping_in_float64")):
        yield ConfigError(
            f"{section}.clip_grad",
            optimizer.clip_grad,
            f"{reason}, and model.dtype is float64",
            f"Set {section}.clip_grad=0 (float64 is for verification)",
        )
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError(
            "optimizer.min_lr",
            optimizer.min_lr,
            f"must not exceed {section}.lr={optimizer.lr}",
            f"Set optimizer.min_lr={optimizer.lr}, or less",
        )


def model_problems(arch: ModelArch, parallel: ParallelConfig) -> Iterator[ConfigError]:
    """Problems of a layout for this model."""
    tp = parallel.tensor_model_parallel_size
    field = "parallel.tensor_model_parallel_size"
    one_matrix = ("rows of queries, keys and values", arch.qkv_rows)
    rows = (
        ("attention heads", arch.num_attention_heads),
        *([one_matrix] if arch.latent is None else arch.latent_rows),
        *arch.normed_rows,
        *arch.dense_rows,
        *arch.delta_heads,
    )
    yield from split_problems(field, tp, rows, arch.num_query_groups)
    yield from _delta_problems(arch, parallel)
    yield from stage_problems(arch.num_layers, parallel)
    yield from _expert_problems(arch, parallel)


def _delta_problems(arch: ModelArch, parallel: ParallelConfig) -> Iterator[ConfigError]:
    if arch.delta is None:
        return
    if reason := faults.reason("packed_delta_nets"):
        yield ConfigError(
            "model.path",
            arch.model_type,
            reason,
            f"Install megatron-core=={faults.V0_19_2}, or use a model whose layers all have "
            "attention",
        )
    if parallel.context_parallel_size > 1:
        field = "parallel.context_parallel_size"
        yield ConfigError(
            field,
            parallel.context_parallel_size,
            "the states of gated delta nets go through a sequence from its start to its end, and "
            "ranks that have parts of it do not hand them on here",
            f"Set {field}=1",
        )


def layer_problems(arch: ModelArch, model: ModelConfig, device_type: str) -> Iterator[ConfigError]:
    """Problems of a network with the layers that this device gives it."""
    parts = {
        "YaRN's rope": arch.yarn is not None,
        "LongRoPE": arch.long_rope is not None,
        "latent attention": arch.latent is not None,
        "gated delta nets": arch.delta is not None,
        "norms behind attention": arch.norms_behind,
        "sliding windows": arch.sliding is not None,
    }
    missing = [name for name, is_needed in parts.items() if is_needed]
    if missing and model.uses_transformer_engine(device_type):
        yield ConfigError(
            "model.layer_spec",
            model.layer_spec,
            "gives layers of Transformer Engine, which are not built with "
            f"{' and '.join(missing)} here",
            "Set model.layer_spec=local",
        )
    modules = model.recompute_modules or ()
    for name, part, has_it in (
        ("mla_up_proj", "latent attention", arch.latent is not None),
        ("gdn_norm_out", "gated delta nets", arch.delta is not None),
    ):
        if has_it and name in modules:
            others = ",".join(other for other in modules if other != name)
            yield ConfigError(
                "model.recompute_modules",
                list(modules),
                f"{name} is of Megatron-Core's own {part}, which is not built here",
                f"Set model.recompute_modules=[{others or 'core_attn'}]",
            )


def router_problems(arch: ModelArch, model: ModelConfig) -> Iterator[ConfigError]:
    """Losses and biases of routers that the model does not have."""
    reasons: dict[str, str] = {}
    if arch.mixture is None:
        reasons = dict.fromkeys(FIELDS, "has no effect: the model has no experts")
    elif arch.mixture.has_bias:
        reason = "is of routers with a softmax: this model's have sigmoids and a balancing bias"
        reasons = dict.fromkeys(LOSSES, reason)
    else:
        reasons[BIAS_RATE] = "has no effect: the model's routers have no bias"
    for name, reason in reasons.items():
        if (value := model.megatron.get(name)) not in (None, 0, "none"):
            yield ConfigError(f"model.megatron.{name}", value, reason, "Leave it out")


def reference_problems(path: str, arch: ModelArch, parallel: ParallelConfig) -> Iterator[str]:
    """Problems of the policy's layout for a reference of its own."""
    own = parallel if arch.mixture else parallel.without_experts
    yield from (f"reference.path={path!r}: {problem}" for problem in model_problems(arch, own))


def _expert_problems(arch: ModelArch, parallel: ParallelConfig) -> Iterator[ConfigError]:
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    field = "parallel.expert_model_parallel_size"
    if arch.mixture is None:
        if ep > 1:
            yield ConfigError(
                field, ep, "has no effect: the model has no experts", f"Set {field}=1"
            )
        return
    if arch.mixture.num_experts % ep:
        yield ConfigError(
            field,
            ep,
            f"must divide the model's {arch.mixture.num_experts} experts",
            f"Choose {nearest(ep, divisors(arch.mixture.num_experts))}",
        )
    etp = parallel.expert_tensor_parallel_size or tp
    yield from split_problems("parallel.expert_tensor_parallel_size", etp, arch.expert_rows)
    is_whole = tp > 1 and not parallel.sequence_parallel
    if is_whole and (reason := faults.reason("experts_without_sequence_parallelism")):
        yield ConfigError(
            "parallel.sequence_parallel", False, reason, "Set parallel.sequence_parallel=true"
        )
