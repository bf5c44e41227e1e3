"""What a rank holds in memory at its peak, from sizes alone.

On a GPU it is what tensors take of the device, in two sums which never live together: of an update,
and of the engine that generates beside what stays of the trainer. On a CPU it is the resident
memory of the process, which also has the libraries and what the allocator keeps:
benchmarks/results/memory.md compares it with what was measured.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.config import RunConfig
from megatron_rl.megatron.activations import Activations
from megatron_rl.megatron.config import Offload
from megatron_rl.ops import native
from megatron_rl.ops.head import logits_bytes
from megatron_rl.parallel.layout import Layout
from megatron_rl.rollout.engine import PROMPT_TOKENS_PER_STEP
from megatron_rl.rollout.group_rules import most_kept
from megatron_rl.rollout.kv_cache import (
    cache_mib,
    policy_state_bytes,
    policy_token_bytes,
    sequence_bytes,
)
from megatron_rl.weights.arch import ModelArch, padded_vocab_size
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.model_source import find_model
from megatron_rl.weights.sizes import held_by

GIB = 2**30
PROCESS = "process and libraries"
REPLAYED = "experts that the engine chose"
SUPPORT = "tokens that each was drawn from"
ENGINE = ("engine's libraries", "engine weights", "key/value cache")
# Measured on a CPU, with Python 3.11 and 3.12: a supervised run of a model of 0.1 million
# parameters, what an engine adds without weights and cache (with 256 sequences over a vocabulary of
# 151,936), and what a save leaves behind.
PROCESS_BYTES, ENGINE_PROCESS_BYTES, SAVING_BYTES = 0.6 * GIB, 0.6 * GIB, 0.25 * GIB
SPREAD = 1.3
"""What the C library's heap takes for a byte of activations. They are allocated and freed in
another order in every pass, and what is free between them is not given back."""

DEFINITION_COPIES = 5  # of the logits, in float32, where no native op turns them into a gradient
SAVED_COPIES = 8
"""What a save of a distributed optimizer holds beside the models, in float32 copies of the weights;
measured. The first replica gathers main weights and both moments, and describes and writes them."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one rank, by name; what is not needed at the same time counts once."""

    held: Mapping[str, float]
    """Held all the time."""

    passing: Mapping[str, float]
    """Held during an update, until its gradients are there."""

    instead: Mapping[str, float]
    """Held at other times, each alone."""

    stepping: Mapping[str, float] = field(default_factory=dict)
    """Held in the optimizer's step, in the place of what is passing; none: no more than that."""

    generating: Mapping[str, float] = field(default_factory=dict)
    """Held while the engine of a GPU generates."""

    @property
    def engine_alone(self) -> float:
        """What a process with an engine and no policy holds, on a CPU."""
        return sum(self.held[name] for name in (PROCESS, *ENGINE) if name in self.held)

    @property
    def update(self) -> float:
        """The sum while the policy is updated."""
        most = max(sum(self.passing.values()), sum(self.stepping.values()))
        return sum(self.held.values()) + most

    @property
    def generation(self) -> float:
        """The sum while the engine generates."""
        return sum(self.held.values()) + sum(self.generating.values())

    @property
    def total(self) -> float:
        alone = sum(self.held.values()) + max(self.instead.values(), default=0.0)
        return max(self.update, self.generation, alone)

    @property
    def largest(self) -> str:
        """The largest parts of what is held at the peak."""
        parts = {**self.held, **self.passing, **self.stepping}
        if self.generation > self.update:
            parts = {**self.held, **self.generating}
        names = sorted(parts, key=lambda name: -parts[name])[:4]
        return ", ".join(f"{name} {parts[name] / GIB:.1f} GiB" for name in names)


def need_of(
    config: RunConfig,
    arch: ModelArch,
    layout: Layout,
    device_type: str,
    *,
    row_tokens: int | None = None,
    kv_mib: int | None = None,
    device_bytes: float = 0.0,
) -> Need:
    """What the busiest rank of a run needs at its peak.

    Args:
        config: the recipe.
        arch: of the model.
        layout: of how many ranks.
        device_type: "cpu" or "cuda".
        row_tokens: limit of a packed row, in the place of config.row_tokens.
        kv_mib: size of a CPU engine's cache, in the place of wanted_kv_mib.
        device_bytes: of a GPU, of which the engine takes a share.
    """
    needs = [
        _on_a_cpu(config, arch, layout, stage, row_tokens, kv_mib)
        if device_type == "cpu"
        else _on_a_gpu(config, arch, layout, stage, row_tokens, device_bytes)
        for stage in range(layout.pp)
    ]
    return max(needs, key=lambda need: need.total)


def _on_a_cpu(
    config: RunConfig,
    arch: ModelArch,
    layout: Layout,
    pp_rank: int,
    row_tokens: int | None,
    kv_mib: int | None,
) -> Need:
    params = sum(held_by(arch, layout, pp_rank))
    parts = _models(config, arch, layout, pp_rank)
    held = {part.name: part.nbytes for part in parts}
    passing = _passing(config, arch, layout, pp_rank, "cpu", row_tokens)
    saves = config.checkpoint.save_every != 0
    held = {PROCESS: PROCESS_BYTES + (SAVING_BYTES if saves else 0.0)} | held
    if config.has_engine_beside:
        mib = wanted_kv_mib(config, arch, layout) if kv_mib is None else kv_mib
        if config.has_vllm:
            libraries, weights = ENGINE[:2]
            held |= {libraries: ENGINE_PROCESS_BYTES}
            held |= {weights: _engine_weights(config, arch, is_cpu=True)}
        held |= {ENGINE[2]: float(mib << 20)}
    if copied := _leaving(config, parts, "cpu"):
        held["copies of what leaves"] = copied  # of the trainer, which are kept
    if keeps_initial_weights(config):
        held["first weights"] = float(params * itemsize(config.model.dtype))
    held |= told_bytes(config, arch, layout)
    instead = {}
    if saves and config.optimizer.use_distributed_optimizer:
        instead["copies for a checkpoint"] = params * 4.0 * SAVED_COPIES
    return Need(held=held, passing=passing, instead=instead)


def _on_a_gpu(
    config: RunConfig,
    arch: ModelArch,
    layout: Layout,
    pp_rank: int,
    row_tokens: int | None,
    device_bytes: float,
) -> Need:
    offload, parts = config.offload_on("cuda"), _models(config, arch, layout, pp_rank)
    passing = _passing(config, arch, layout, pp_rank, "cuda", row_tokens)
    stays: dict[str, float] = {}
    leaves: dict[str, float] = {}
    comes_late: dict[str, float] = {}
    instead: dict[str, float] = {}
    for part in parts:
        if offload == "none" or (offload == "optimizer" and part.kind in ("weights", "frozen")):
            stays[part.name] = part.nbytes
        elif part.kind == "frozen":  # on the device with the weights, for its own passes
            weights = sum(p.nbytes for p in parts if p.kind == "weights")
            instead["reference model, beside weights"] = part.nbytes + weights
        elif part.kind == "optimizer":
            comes_late[part.name] = part.nbytes
        else:
            leaves[part.name] = part.nbytes
    stepping: dict[str, float] = {}
    # An optimizer that has left comes back for its step, when activations are free, and stays until
    # the next rollout: beside those of another step.
    steps = config.num_updates * config.optimizer.epochs
    if comes_late and steps == 1 and not config.algorithm.resolved.needs_critic:
        stepping, passing = {**leaves, **comes_late}, {**leaves, **passing}
    else:
        passing = {**leaves, **comes_late, **passing}
    generating: dict[str, float] = {}
    if config.has_engine_beside:  # asleep during an update
        weights = _engine_weights(config, arch, is_cpu=False) if config.has_vllm else 0.0
        share = config.rollout.gpu_memory_utilization * device_bytes
        least = float(kv_bytes_of_sequence(config, arch))
        if config.rollout.kv_cache_mib is not None:
            share, least = 0.0, float(config.rollout.kv_cache_mib << 20)
        generating = {"engine weights": weights} if config.has_vllm else {}
        generating["key/value cache and buffers"] = max(share - weights, least)
    return Need(
        held=stays, passing=passing, stepping=stepping, generating=generating, instead=instead
    )


def host_bytes_of_offload(
    config: RunConfig, arch: ModelArch, layout: Layout, device_type: str
) -> float:
    """Bytes of host memory that the busiest rank keeps for what leaves its device."""
    stages = (_models(config, arch, layout, pp_rank) for pp_rank in range(layout.pp))
    return max(_leaving(config, parts, device_type) for parts in stages)


def _leaving(config: RunConfig, parts: Sequence["_Part"], device_type: str) -> float:
    kinds: dict[Offload, tuple[str, ...]] = {
        "none": (),
        "optimizer": ("optimizer",),
        "weights": ("optimizer", "weights", "frozen"),
    }
    kept = kinds[config.offload_on(device_type)]
    return sum(part.nbytes for part in parts if part.kind in kept)


def told_bytes(config: RunConfig, arch: ModelArch, layout: Layout) -> dict[str, float]:
    """Bytes of host memory for what the engine tells of tokens besides log-probs, at the longest.

    It is there twice: with the rollouts that a rank drew, and with the rows that it trains.
    """
    prompts, rollout = config.prompts.prompts_per_iteration, config.rollout
    drawn = prompts * rollout.group_size / layout.world_size  # of a round
    trained = prompts * most_kept(rollout, config.algorithm) / (layout.dp * layout.cp)
    told = {}
    if rollout.routing_replay and arch.mixture is not None:
        mixtures = sum(map(arch.has_experts, range(arch.num_layers)))
        chosen = mixtures * arch.mixture.top_k * config.longest_sequence  # of a response
        own = 1 if arch.mixture.num_experts <= 256 else 2
        told[REPLAYED] = float(chosen * (drawn * own + trained * 2))
    if rollout.is_truncated:
        support = 4 * min(rollout.top_k, arch.vocab_size) * rollout.max_response_tokens
        told[SUPPORT] = float(support * (drawn + trained))
    return told


def keeps_initial_weights(config: RunConfig) -> bool:
    """True where every rank has a copy of the first weights in host memory."""
    is_measured = config.metrics.kl_every > 0 and not config.is_supervised
    has_own = config.reference.path is not None
    return is_measured or (Algorithm(config.algorithm).needs_ref_logprobs and not has_own)


def reference_arch(config: RunConfig) -> ModelArch | None:
    """The network of a reference that is another model than the policy's."""
    path = config.reference.path
    return None if path is None else _arch_of(path, tuple(config.model.ignore_config_fields))


@functools.cache
def _arch_of(path: str, ignored: tuple[str, ...]) -> ModelArch:
    return read_model_config(find_model(path, "reference.path").config_dir, ignored)


def wanted_kv_mib(config: RunConfig, arch: ModelArch, layout: Layout) -> int:
    """MiB per rank of a CPU engine's cache: of the recipe, or as many as its rollouts can use."""
    if config.rollout.kv_cache_mib is not None:
        return config.rollout.kv_cache_mib
    engines = layout.copies
    if config.engine_tp is not None:
        engines = layout.world_size // config.engine_tp
    drawn = config.prompts.prompts_per_iteration * config.rollout.group_size  # of a round
    sequences = min(config.rollout.max_num_seqs, -(-drawn // engines))
    return cache_mib(kv_bytes_of_sequence(config, arch), sequences)


def kv_bytes_of_sequence(config: RunConfig, arch: ModelArch) -> int:
    """Bytes per rank that the longest sequence takes of an engine's cache."""
    if config.engine_tp is None:
        layout = config.layout_of(config.smallest_world)
        nbytes = itemsize(config.model.dtype)
        of_token = policy_token_bytes(arch, layout, itemsize=nbytes)
        states = policy_state_bytes(arch, layout, itemsize=nbytes)
        return longest_in_engine(config, arch) * of_token + states
    return sequence_bytes(
        arch,
        tokens=longest_in_engine(config, arch),
        tp=config.rollout.tensor_model_parallel_size,
        itemsize=itemsize(config.engine_dtype),
    )


def longest_in_engine(config: RunConfig, arch: ModelArch) -> int:
    """Most tokens of a sequence in the engine, of rollouts and of evaluations."""
    evaluation = config.evaluation.max_response_tokens or 0
    response = max(config.rollout.max_response_tokens, evaluation)
    return min(config.prompts.max_prompt_tokens + response, arch.max_position_embeddings)


def longest_row(config: RunConfig, layout: Layout, row_tokens: int | None = None) -> int:
    """Most tokens that a packed row can have: its limit, or all that a rank trains at a time."""
    # Balanced over the replicas, so that none has more than its share and one unit.
    most = _tokens_of_update(config)
    share = min(most // layout.dp + config.longest_unit, most)
    return max(1, min(row_tokens or config.row_tokens, share))


def rows_of_update(config: RunConfig, layout: Layout, row_tokens: int) -> int:
    """Rows of so many tokens that a rank trains in an update of the longest sequences."""
    return max(1, -(-_tokens_of_update(config) // (layout.dp * row_tokens)))


def _tokens_of_update(config: RunConfig) -> int:
    """Tokens of all ranks in an update of the longest sequences."""
    prompts = config.optimizer.prompts_per_update or config.prompts.prompts_per_iteration
    group = 1 if config.is_supervised else most_kept(config.rollout, config.algorithm)
    return prompts * group * config.longest_sequence


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of the trainer."""

    name: str
    kind: Literal["weights", "gradients", "optimizer", "frozen"]
    nbytes: float


def _models(config: RunConfig, arch: ModelArch, layout: Layout, pp_rank: int) -> list[_Part]:
    """Weights, gradients and optimizers of a pipeline rank."""
    shared, experts = held_by(arch, layout, pp_rank)
    params, nbytes = shared + experts, itemsize(config.model.dtype)
    stepped = params
    if config.optimizer.use_distributed_optimizer:
        stepped = shared // layout.copies + experts // layout.expert_dp
    parts = [
        _Part(name="weights", kind="weights", nbytes=float(params * nbytes)),
        _Part(
            name="gradients",
            kind="gradients",
            nbytes=float(params * (4 if nbytes == 2 else nbytes)),
        ),
        # Adam's two moments; 16-bit weights have float32 main weights and moments.
        _Part(
            name="optimizer",
            kind="optimizer",
            nbytes=float(stepped * (12 if nbytes == 2 else 2 * nbytes)),
        ),
    ]
    if config.algorithm.resolved.needs_critic:
        # Without the LM head; what is alive of one row at a time is counted once.
        head = padded_vocab_size(arch.vocab_size, layout.tp) // layout.tp * arch.hidden_size
        head = head if pp_rank == layout.pp - 1 else 0
        share = (params - head) / params
        parts += [
            replace(part, name=f"critic's {part.name}", nbytes=share * part.nbytes)
            for part in parts
        ]
    if (reference := reference_arch(config)) is not None:
        held = float(sum(held_by(reference, layout, pp_rank)) * nbytes)
        parts.append(_Part(name="reference model", kind="frozen", nbytes=held))
    return parts


def _engine_weights(config: RunConfig, arch: ModelArch, *, is_cpu: bool) -> float:
    # On a CPU a tied head has a packed copy beside the embedding.
    packed = arch.vocab_size * arch.hidden_size if is_cpu and arch.tied_embeddings else 0
    # What makes latent vectors is whole on every rank.
    whole = sum(rows for _, rows in arch.latent_rows) * arch.hidden_size * arch.num_layers
    cut = arch.num_parameters + packed - whole
    count = whole + cut / config.rollout.tensor_model_parallel_size
    return itemsize(config.engine_dtype) * count


def _passing(
    config: RunConfig,
    arch: ModelArch,
    layout: Layout,
    pp_rank: int,
    device_type: str,
    row_tokens: int | None,
) -> dict[str, float]:
    """Activations of the longest row and a chunk of logits; on a CPU also what comes later."""
    nbytes, is_cpu = itemsize(config.model.dtype), device_type == "cpu"
    tokens = longest_row(config, layout, row_tokens)
    layers = Activations(
        arch=arch,
        model=config.model,
        parallel=config.parallel,
        device_type=device_type,
        itemsize=nbytes,
    )
    rows = rows_of_update(config, layout, tokens)
    activations = layers.kept(-(-tokens // layout.cp), num_rows=rows, pp_rank=pp_rank)
    vocab = padded_vocab_size(arch.vocab_size, layout.tp) // layout.tp
    logits = min(float(logits_bytes(device_type)), tokens / layout.cp * vocab * nbytes)
    is_native = not is_cpu or native.has("dlogits", torch.device("cpu"))
    if config.ops.backend == "reference" or not is_native:
        logits *= 1 + DEFINITION_COPIES * 4 / nbytes
    name = f"activations of a row of {tokens} tokens"
    made = {name: activations * (SPREAD if is_cpu else 1.0)}
    later = {"logits of one chunk": logits}
    if is_cpu and is_native:  # which keeps them
        made |= later
        later = {}
    if arch.delta is not None:  # it comes in the backward, when logits are gone
        later["chunks of a gated delta net"] = layers.of_one_net(tokens)
    if is_cpu:
        # gloo copies a buffer that it reduces, when activations are free but not given back.
        params = sum(held_by(arch, layout, pp_rank))
        later["copy of the gradients"] = float(params * max(4, nbytes))
        if config.has_engine_beside:
            later["an engine's step"] = _engine_step(config, arch)
    largest = max(later, key=lambda name: later[name])
    return made | {largest: later[largest]}


def _engine_step(config: RunConfig, arch: ModelArch) -> float:
    """What a step of the engine takes on a CPU: a layer of its prompts, and rows of logits."""
    rollout, nbytes = config.rollout, itemsize(config.engine_dtype)
    tp = config.engine_tp or config.parallel.tensor_model_parallel_size
    sequences = min(rollout.max_num_seqs, config.prompts.prompts_per_iteration * rollout.group_size)
    prompts = min(PROMPT_TOKENS_PER_STEP, sequences * config.prompts.max_prompt_tokens)
    layer = 3 * arch.ffn_hidden_size + arch.widest_mixer
    tokens = prompts * (layer / tp + 4 * arch.hidden_size) * nbytes
    return tokens + 3 * 4 * sequences * arch.vocab_size


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return int(getattr(torch, dtype).itemsize)
