"""What a rank does: build the policy at a layout, train a case, compare with the answer.

Imported on ranks only, after preload_megatron has adapted Megatron-Core.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import preload_megatron  # noqa: F401  # isort: split
import torch
import torch.distributed as dist
from cases import TEMPERATURE, Case, Problem, owned
from layout import Layout
from megatron.core import parallel_state
from reference import Recipe, Values
from router_reference import Auxiliary
from routers_on_ranks import auxiliary_error, bias_changes, routers_in_own_dtype
from tiny_models import MAX_RESPONSE_TOKENS, VOCAB_SIZE
from torch import Tensor
from torch.distributed.distributed_c10d import _world

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.algorithms.config import AlgorithmConfig
from megatron_rl.algorithms.presets import PRESETS
from megatron_rl.batching.packer import Packer
from megatron_rl.megatron import model as model_module
from megatron_rl.megatron.config import ModelConfig, OptimizerConfig
from megatron_rl.megatron.groups import join
from megatron_rl.megatron.model import TrainedModel
from megatron_rl.objectives.registry import OBJECTIVES
from megatron_rl.ops import backend
from megatron_rl.ops import head as head_module
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.parallel.groups import Groups
from megatron_rl.platforms.base import detect
from megatron_rl.policy.critic import Critic
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.token_advantages import estimate, with_distillation
from megatron_rl.types import MicroBatch, MiniBatch, RolloutGroup
from megatron_rl.weights.arch import padded_vocab_size
from megatron_rl.weights.families.registry import read_model_config
from megatron_rl.weights.layouts import float32_names, hf_shapes
from megatron_rl.weights.model_source import ModelSource
from megatron_rl.weights.pieces import view

RECOMPUTE: dict[str | None, dict[str, Any]] = {
    None: {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "experts": {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)},
}
Fault = Callable[[Policy], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Errors over all ranks, relative to the largest entry of what is compared."""

    layout: str
    case: str
    loss_error: float
    gradient_error: float
    worst_tensor: str
    norm_error: float
    auxiliary_error: float  # of the metrics
    bias_error: float  # of biases of routers after the update
    biases_moved: int  # entries, of all ranks
    logprob_error: float  # of a pass that measures, in nats, where an engine chose the experts
    rows: tuple[int, ...]  # of each data-parallel rank
    empty_ranks: int  # data-parallel ranks without a sample


@contextmanager
def groups_at(
    layout: Layout, rollout_tp: int | None = 1
) -> Iterator[tuple[ParallelConfig, Groups]]:
    """The configuration of a layout, and Megatron's groups for as long as they are used."""
    gc.collect()  # models hold their groups in circles, and so the threads of those before
    parallel = _parallel(layout)
    with _groups_destroyed():
        try:
            yield parallel, join(detect(), parallel, rollout_tp)
        finally:
            parallel_state.destroy_model_parallel()


@contextmanager
def _groups_destroyed() -> Iterator[None]:
    """Destroy the process groups made inside.

    Each gloo group has threads, one of which wakes up every 10 ms: those of a dozen layouts
    together leave no time to compute.
    """
    alive = set(_world.pg_map)
    yield
    dist.barrier()
    for group in set(_world.pg_map) - alive:
        dist.destroy_process_group(group)


def _parallel(layout: Layout) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        num_layers_in_first_pipeline_stage=layout.split.first,
        num_layers_in_last_pipeline_stage=layout.split.last,
        account_for_embedding_in_pipeline_split=layout.split.counts_embedding,
        account_for_loss_in_pipeline_split=layout.split.counts_loss,
        sequence_parallel=layout.sequence_parallel,
        overlap_grad_reduce=layout.overlaps_reduction,
    )


@contextmanager
def policy_at(
    layout: Layout,
    problem: Problem,
    optimizer: OptimizerConfig,
    dtype: str = "float64",
    *,
    megatron: dict[str, Any] | None = None,
) -> Iterator[Policy]:
    """The policy with the problem's weights, ready to be trained; `megatron` is not checked."""
    build = partial(Policy, temperature=TEMPERATURE)
    with (
        _model_at(build, layout, problem, problem.model_dir, optimizer, dtype, megatron) as policy,
        _small_chunks(layout) if layout.chunk_rows else nullcontext(),
    ):
        yield policy


@contextmanager
def critic_at(
    layout: Layout, problem: Problem, model_dir: Path, optimizer: OptimizerConfig
) -> Iterator[Critic]:
    """A critic with the weights of model_dir, likewise."""
    with _model_at(Critic, layout, problem, model_dir, optimizer, "float64") as critic:
        yield critic


def teacher_beside(policy: Policy, layout: Layout, model_dir: Path) -> Policy:
    """Another model in the groups of the policy, frozen."""
    arch, parallel = read_model_config(model_dir), _parallel(layout)
    teacher = Policy(
        arch,
        ModelConfig(path=str(model_dir), dtype="float64"),
        parallel if arch.mixture else parallel.without_experts,
        OptimizerConfig(),
        policy.groups,
        temperature=TEMPERATURE,
        run_updates=1,
    )
    teacher.load(ModelSource(config_dir=model_dir))
    return teacher


def critic_beside(
    policy: Policy, layout: Layout, problem: Problem, optimizer: OptimizerConfig
) -> Critic:
    """A critic from the problem's weights, in the groups of the policy."""
    critic = Critic(
        policy.arch,
        ModelConfig(path=str(problem.model_dir), dtype="float64"),
        _parallel(layout),
        optimizer,
        policy.groups,
        run_updates=10,
    )
    critic.load(ModelSource(config_dir=problem.model_dir))
    critic.prepare_training()
    return critic


@contextmanager
def _model_at(
    build: Callable[..., Any],
    layout: Layout,
    problem: Problem,
    model_dir: Path,
    optimizer: OptimizerConfig,
    dtype: str,
    megatron: dict[str, Any] | None = None,
) -> Iterator[Any]:
    settings = ModelConfig(
        path=str(problem.model_dir),
        dtype=dtype,
        megatron={
            **dict(layout.megatron),
            **_fields_of(layout.auxiliary),
            **(megatron or {}),
        },
        **RECOMPUTE[layout.recompute],
    )
    in_own_dtype = routers_in_own_dtype() if dtype == "float64" else nullcontext()
    with groups_at(layout) as (parallel, groups), _ops(layout), in_own_dtype:
        arch = read_model_config(problem.model_dir)
        model = build(arch, settings, parallel, optimizer, groups, run_updates=10)
        model.load(ModelSource(config_dir=model_dir))
        with small_buckets() if layout.overlaps_reduction else nullcontext():
            model.prepare_training()
        yield model


def _fields_of(auxiliary: Auxiliary | None) -> dict[str, Any]:
    if auxiliary is None:
        return {}
    kinds = {None: "none", "sequence": "seq_aux_loss", "update": "global_aux_loss"}
    return {
        "moe_router_load_balancing_type": kinds[auxiliary.over],
        "moe_aux_loss_coeff": auxiliary.balance,
        "moe_z_loss_coeff": auxiliary.z or None,
    }


@contextmanager
def _ops(layout: Layout) -> Iterator[None]:
    device = detect().current_device()
    backend.choose(layout.ops, device)
    try:
        yield
    finally:
        backend.choose("auto", device)


def _small_chunks(layout: Layout) -> AbstractContextManager[Any]:
    row_bytes = 8 * padded_vocab_size(VOCAB_SIZE, layout.tp) // layout.tp
    most = layout.chunk_rows * row_bytes
    return mock.patch.object(head_module, "logits_bytes", return_value=most)


def small_buckets() -> AbstractContextManager[Any]:
    """Gradients in many buckets, so that those of the head do not wait for any other gradient."""
    stock = model_module.DistributedDataParallelConfig
    small = partial(stock, bucket_size=1000)
    return mock.patch.object(model_module, "DistributedDataParallelConfig", small)


def algorithm_of(recipe: Recipe, *, train_on_everything: bool = False) -> Algorithm:
    settings = dict(vars(recipe))
    correction = settings.pop("correction")
    if correction is not None:
        names = ("level", "mode", "low", "high")
        settings["rollout_correction"] = dict(zip(names, correction, strict=True))
    own = {name: settings.pop(key) for key, name in OBJECTIVE_SETTINGS.items()}
    kind = OBJECTIVES[PRESETS[recipe.preset].objective]
    objective = {name: value for name, value in own.items() if name in kind.model_fields}
    for key, name in OBJECTIVE_SETTINGS.items():
        assert name in objective or own[name] == getattr(Recipe(preset=""), key), f"no {name}"
    config = AlgorithmConfig(
        **settings, objective=objective, train_on_everything=train_on_everything
    )
    return Algorithm(config)


OBJECTIVE_SETTINGS = {
    "eps_low": "eps_low",
    "eps_high": "eps_high",
    "dual_clip": "dual_clip",
    "tau_positive": "tau_positive",
    "tau_negative": "tau_negative",
    "dpo_beta": "beta",
    "dpo_reference": "reference",
}
"""Field of a Recipe -> setting of the objective that has it."""


def pack(
    policy: TrainedModel,
    algorithm: Algorithm,
    own_groups: Sequence[RolloutGroup],
    *,
    update_of: dict[int, int],
    row_tokens: int,
    shares_prompts: bool = False,
) -> list[MiniBatch]:
    """From this rank's groups to its packed rows, the way of the loop."""

    def sum_over_ranks(local: Tensor) -> Tensor:
        dist.all_reduce(local, group=policy.groups.world)
        return local

    selection = algorithm.select(own_groups, update_of=update_of, seed=(0, 0))
    selection = replace(
        selection,
        samples=algorithm.assign_advantages(selection.samples, sum_over_ranks=sum_over_ranks),
    )
    packer = packer_of(policy, algorithm, row_tokens=row_tokens, shares_prompts=shares_prompts)
    return packer.pack(selection, 1 + max(update_of.values()))


def packer_of(
    policy: TrainedModel, algorithm: Algorithm, *, row_tokens: int, shares_prompts: bool = False
) -> Packer:
    return Packer(
        policy.groups,
        algorithm,
        row_tokens=row_tokens,
        row_multiple=policy.groups.layout.row_multiple(
            sequence_parallel=policy.config.sequence_parallel
        ),
        max_response_tokens=MAX_RESPONSE_TOKENS,
        dtype=policy.dtype,
        share_prompts=shares_prompts,
    )


def microbatches_of(policy: Policy, case: Case, problem: Problem) -> tuple[MicroBatch, ...]:
    question = case.question
    algorithm = algorithm_of(question.recipe, train_on_everything=case.train_on_everything)
    groups = problem.groups[question.groups]
    (batch,) = pack(
        policy,
        algorithm,
        owned(groups, case.owners, dist.get_rank(), dist.get_world_size()),
        update_of={group.prompt.group_id: 0 for group in groups},
        row_tokens=case.row_tokens,
        shares_prompts=case.shares_prompts,
    )
    rows = batch.microbatches
    keeps_all = question.recipe.preset == "grpo" and question.groups == "graded"
    if case.shares_prompts and keeps_all and dist.get_world_size() == 1:
        assert any(row.shared is not None for row in rows)
    if question.has_old:
        rows = tuple(row.with_loss(old_logprobs=_at_rows(problem.old, row)) for row in rows)
    if algorithm.needs_ref_logprobs:
        rows = tuple(row.with_loss(ref_logprobs=_at_rows(problem.ref, row)) for row in rows)
    if algorithm.choice.needs_critic:
        rows = with_values(policy, replace(batch, microbatches=rows), algorithm, problem)
    (batch,) = with_distillation(
        [replace(batch, microbatches=rows)], algorithm.config.distillation_weight
    )
    return batch.microbatches


def with_values(
    model: TrainedModel, batch: MiniBatch, algorithm: Algorithm, problem: Problem
) -> tuple[MicroBatch, ...]:
    """The rows with advantages and returns that follow from the problem's values."""
    values = [_at_rows(problem.values, row) for row in batch.microbatches]
    estimated = estimate(
        [batch],
        [values if model.groups.is_last_stage else None],
        algorithm.config,
        kl_coef=algorithm.config.kl_reward_coef,
        sum_over_ranks=model.summed,
    )
    return estimated.batches[0].microbatches


def _at_rows(values: Values, row: MicroBatch) -> Tensor:
    parts = [values[sample.group_id, sample.index] for sample in row.samples]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def named_main_grads(policy: TrainedModel) -> dict[str, Tensor]:
    """This rank's gradients under the names of weights/layouts; views of Megatron's buffer."""
    vpp = policy.groups.layout.vpp
    return {
        (f"chunk{chunk}." if vpp > 1 else "") + name: parameter.main_grad
        for chunk, module in enumerate(policy.chunks)
        for name, parameter in module.named_parameters()
    }


def head_is_in_main_grad(policy: Policy) -> bool:
    """Whether the head's gradient came there without one of autograd's; last stage only."""
    return policy.head_weight.grad_added_to_main_grad


def measure(
    policy: Policy,
    case: Case,
    problem: Problem,
    *,
    layout: Layout,
    fault: Fault | None = None,
    change: Callable[[tuple[MicroBatch, ...]], tuple[MicroBatch, ...]] | None = None,
) -> Measurement:
    """Train the case for one step, compare, and put the weights back; every rank calls it."""
    answer = problem.answers[case.question]
    rows = microbatches_of(policy, case, problem)
    rows = rows if change is None else change(rows)
    weights = policy.snapshot()
    scored = policy.logprobs(rows) if case.question.groups == "routed" else None
    with nullcontext() if fault is None else fault(policy):
        minimised = algorithm_of(case.question.recipe).loss()
        metrics = policy.update(rows, minimised).metrics
        loss = metrics["policy/loss"]
        norm = policy.optimizer.get_grad_norm()
    bias_error, biases_moved = bias_changes(policy, weights, answer, layout)
    for name, parameter in policy.named_parameters().items():
        parameter.copy_(weights[name])
    error, worst = largest_error(policy, named_main_grads(policy), answer.gradients)
    pairs = [(row, own) for row, own in zip(rows, scored or (), strict=False) if len(own)]
    counts = [None] * dist.get_world_size()
    here = policy.groups.here
    dist.all_gather_object(counts, (here.dp_rank, len(rows), sum(len(row.samples) for row in rows)))
    counted = {dp_rank: (num_rows, samples) for dp_rank, num_rows, samples in counts}
    return Measurement(
        layout=layout.name,
        case=case.name,
        loss_error=abs(loss - answer.loss) / max(abs(answer.loss), 0.1),
        gradient_error=error,
        worst_tensor=worst,
        norm_error=abs(norm - answer.norm) / answer.norm,
        bias_error=bias_error,
        biases_moved=biases_moved,
        auxiliary_error=auxiliary_error(metrics, answer, case.question.auxiliary),
        logprob_error=max(
            (float((own - _at_rows(problem.routed, row)).abs().max()) for row, own in pairs),
            default=0.0,
        ),
        rows=tuple(counted[dp_rank][0] for dp_rank in sorted(counted)),
        empty_ranks=sum(samples == 0 for _, samples in counted.values()),
    )


def largest_error(
    policy: TrainedModel,
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    scale: dict[str, Tensor] | None = None,
) -> tuple[float, str]:
    """Largest error over all ranks and tensors, and the Hugging Face name of the worst tensor.

    Every copy on every rank is compared. Relative to the largest entry of the expected tensor, or
    of the one in scale.
    """
    names = [name for name in hf_shapes(policy.arch) if name in expected]
    assert set(names) == set(expected)
    trained = [piece for piece in policy.pieces if piece.hf not in float32_names(policy.arch)]
    assert {piece.hf for piece in trained} <= set(names)
    errors = torch.zeros(len(names), dtype=torch.float64)
    for piece in trained:
        got = view(actual[piece.param], piece.index).double()
        wanted = view(expected[piece.hf], piece.box)
        row = names.index(piece.hf)
        error = (got - wanted).abs().max()
        errors[row] = errors[row].maximum(error.nan_to_num(nan=torch.inf))
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    sizes = torch.stack([(scale or expected)[name].abs().max() for name in names])
    errors = errors / sizes.clamp(min=torch.finfo(torch.float64).tiny)  # an expert without tokens
    return errors.max().item(), names[int(errors.argmax())]


def uncovered_elements(policy: Policy) -> int:
    """Elements of the model that no rank's pieces hold, so that nothing was compared there."""
    missing = 0
    for name, shape in hf_shapes(policy.arch).items():
        covered = torch.zeros(shape, dtype=torch.uint8)
        for piece in policy.pieces:
            if piece.hf == name:
                view(covered, piece.box).fill_(1)
        dist.all_reduce(covered, op=dist.ReduceOp.MAX)
        missing += int((covered == 0).sum())
    return missing


def padding_gradient(policy: Policy, gradients: dict[str, Any]) -> float:
    """Largest gradient, over all ranks, of rows that stand for no Hugging Face element."""
    outside = torch.zeros(1, dtype=torch.float64)
    for name, gradient in gradients.items():
        is_padding = torch.ones_like(gradient, dtype=torch.bool)
        for piece in policy.pieces:
            if piece.param == name:
                view(is_padding, piece.index).fill_(False)
        if is_padding.any():
            outside = outside.maximum(gradient[is_padding].abs().max().double())
    dist.all_reduce(outside, op=dist.ReduceOp.MAX)
    return outside.item()
