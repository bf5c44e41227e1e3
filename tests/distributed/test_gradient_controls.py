"""The comparison of test_gradient_invariance notices faults, and only faults."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import FEW_ROWS, MANY_ROWS, Case, Question, question_of
from harness import run_on_ranks
from reference import Recipe
from splits import LAYOUTS
from tiny_models import VOCAB_SIZE

from megatron_rl.errors import RunError
from megatron_rl.ops import backend, native

CPU = torch.device("cpu")
NOTICED = 1e-3
BOUND = 1e-12

CASE = Case(question=question_of("grpo"), row_tokens=MANY_ROWS)
OF_RESPONSES = Case(question=question_of("gspo"), row_tokens=MANY_ROWS)
ROUTED = Case(
    question=Question(recipe=Recipe(preset="grpo"), groups="routed"), row_tokens=MANY_ROWS
)
WITH_REJECTED = Case(
    question=question_of("reinforce_rej"), row_tokens=MANY_ROWS, train_on_everything=True
)

BALANCED = "CP2 EP2, all recomputed, balanced"
# fault -> layouts at which it must be noticed, and the error that shows it
FAULTS = {
    "one_rank_doubled": (("DP2", "TP2", "TP2 SP", "PP2", "CP2"), "gradient_error"),
    "no_data_parallel_reduction": (("DP2",), "gradient_error"),
    "no_reduction_of_norms": (("TP2 SP",), "gradient_error"),
    "norms_without_tag": (("TP2 SP",), "gradient_error"),
    "no_reduction_of_tied_embedding": (("PP2, tied",), "gradient_error"),
    "no_reduction_behind_the_head": (("TP2",), "gradient_error"),
    "schedule_divides": (("DP2", "PP2"), "gradient_error"),
    "one_target_shifted": (("DP2", "TP2", "TP2 SP", "PP2", "CP2"), "gradient_error"),
    "no_tensor_parallel_marks": (("TP2", "TP2 SP"), "norm_error"),
    "no_reduction_of_experts": (("DP4 EP2",), "gradient_error"),
    "keys_of_own_tokens_alone": (("CP2",), "gradient_error"),
    "seam_shifted": (("CP2",), "gradient_error"),
    "positions_of_the_part": (("CP2",), "gradient_error"),
    "no_reduction_of_keys": (("CP2",), "gradient_error"),
    "no_reduction_over_parts": (("CP2",), "gradient_error"),
    "response_of_own_tokens_alone": (("CP2",), "gradient_error"),
    "keys_of_prompts_for_one_response": (("DP2, shared prompts",), "gradient_error"),
    "responses_without_prompt": (("DP2, shared prompts",), "gradient_error"),
    "positions_go_on_behind_a_response": (("DP2, shared prompts",), "gradient_error"),
    "layers_from_one_too_far": (("PP2 of 1, 3",), "gradient_error"),
    "experts_balanced_by_row": ((BALANCED,), "gradient_error"),
    "padding_balances_experts": ((BALANCED,), "gradient_error"),
    "experts_balanced_by_part": ((BALANCED,), "gradient_error"),
    "losses_of_routers_by_rank": (("DP2, balanced",), "gradient_error"),
    "experts_counted_on_one_rank": (("DP2, balanced",), "gradient_error"),
    "experts_not_replayed": ((BALANCED,), "gradient_error"),
    "experts_of_the_token_before": ((BALANCED,), "gradient_error"),
}
WHERE = ("DP2", "TP2", "TP2 SP", "PP2", "PP2, tied", "CP2")
OTHERS = ("DP2, shared prompts", "DP4 EP2", "PP2 of 1, 3", BALANCED, "DP2, balanced")
CASES_OF = {
    "response_of_own_tokens_alone": OF_RESPONSES,
    "experts_not_replayed": ROUTED,
    "experts_of_the_token_before": ROUTED,
}  # else CASE


@pytest.fixture(scope="module")
def errors(problems, tmp_path_factory):
    """ "layout: fault" -> Measurement; under fault "none", the largest of several."""
    found = {}
    for world in (2, 4):
        out = tmp_path_factory.mktemp("controls") / f"{world}.json"
        run_on_ranks(world, measure_faults, problems, out)
        found |= json.loads(out.read_text())
    return found


@pytest.mark.parametrize(
    ("fault", "layout"),
    [(fault, layout) for fault, (layouts, _) in FAULTS.items() for layout in layouts],
)
def test_a_fault_is_noticed(errors, fault, layout):
    assert errors[f"{layout}: {fault}"][FAULTS[fault][1]] > NOTICED


@pytest.mark.parametrize("layout", WHERE + OTHERS)
def test_no_fault_is_noticed_where_there_is_none(errors, layout):
    assert errors[f"{layout}: none"]["gradient_error"] < BOUND


@pytest.mark.parametrize("layout", WHERE)
def test_what_has_no_loss_does_not_change_a_bit(errors, layout):
    """Targets of prompts, of padding and of rejected samples; and who sampled which group."""
    assert errors[f"{layout}: changed bits"] == []


@pytest.mark.parametrize("layout", WHERE)
def test_an_update_that_is_not_finite_is_left_out_where_the_recipe_says_so(errors, layout):
    """(counted, weights are as before, updates taken) of a bad loss, a bad gradient, good ones."""
    assert errors[f"{layout}: skips"] == [[1.0, True, 0], [1.0, True, 0], [0.0, False, 1]]


@pytest.mark.skipif(not native.BUILT, reason=f"no native ops: {native.FAULT}")
@pytest.mark.parametrize("layout", FAULTS["schedule_divides"][0])
def test_a_run_with_native_ops_stops_if_the_schedule_divides(errors, layout):
    """They have written the gradient of the head before they learn of it."""
    assert "the gradient norm is nan" in errors[f"{layout}: stops"]


def measure_faults(problems: dict[str, Path], out: Path) -> None:
    from policy_on_ranks import measure, policy_at

    from megatron_rl.megatron.config import OptimizerConfig

    found: dict[str, Any] = {}
    world = dist.get_world_size()
    for layout in (y for y in LAYOUTS if y.name in WHERE + OTHERS and y.world == world):
        problem = torch.load(problems[layout.model], weights_only=False)
        with policy_at(layout, problem, OptimizerConfig(lr=1e-3, clip_grad=0.0)) as policy:
            clean = []
            plain = _balanced(CASE, layout)
            for fault in (f for f, (layouts, _) in FAULTS.items() if layout.name in layouts):
                change = CHANGES[fault](policy) if fault in CHANGES else None
                inject = None if change else globals()[fault]
                case = _balanced(CASES_OF.get(fault, CASE), layout)
                found[f"{layout.name}: {fault}"] = vars_of(
                    measure(policy, case, problem, layout=layout, fault=inject, change=change)
                )
                clean.append(measure(policy, plain, problem, layout=layout))
            clean.append(measure(policy, plain, problem, layout=layout))
            found[f"{layout.name}: none"] = vars_of(max(clean, key=lambda m: m.gradient_error))
            if layout.name in WHERE:
                found[f"{layout.name}: changed bits"] = changed_bits(policy, problem, layout)
                found[f"{layout.name}: skips"] = skipped_updates(policy)
            if native.BUILT and layout.name in FAULTS["schedule_divides"][0]:
                found[f"{layout.name}: stops"] = error_of_a_division(policy, problem, layout)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


def _balanced(case: Case, layout: Any) -> Case:
    """The case with the losses of routers that the layout has, or with its shared prompts."""
    case = replace(case, question=replace(case.question, auxiliary=layout.auxiliary))
    return (
        replace(case, row_tokens=FEW_ROWS, shares_prompts=True) if layout.shares_prompts else case
    )


def vars_of(measurement: Any) -> dict[str, Any]:
    return {
        name: getattr(measurement, name)
        for name in ("gradient_error", "loss_error", "norm_error", "worst_tensor")
    }


def changed_bits(policy: Any, problem: Any, layout: Any) -> list[str]:
    """Names of changes without effect on the loss after which some gradient had other bits."""
    from policy_on_ranks import measure, named_main_grads

    def gradients(case: Case, change: Any = None) -> dict[str, torch.Tensor]:
        measure(policy, case, problem, layout=layout, change=change)
        return {name: grad.clone() for name, grad in named_main_grads(policy).items()}

    found = []
    for name, before, after in (
        ("nothing", gradients(CASE), gradients(CASE)),
        ("targets", gradients(WITH_REJECTED), gradients(WITH_REJECTED, other_targets)),
        ("owners", gradients(CASE), gradients(replace(CASE, owners="backwards"))),
    ):
        same = torch.tensor(all(torch.equal(before[key], after[key]) for key in before)).int()
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        if not same:
            found.append(name)
    return found


def skipped_updates(policy: Any) -> list[Any]:
    """What steps say that must skip, and then one that must not; and what they changed."""
    config = policy._optimizer_config
    policy._optimizer_config = config.model_copy(update={"on_nonfinite": "skip"})
    before, told = policy.snapshot(), []

    def note(loss: float) -> None:
        counted = policy.step(loss)["policy/nonfinite_updates"]
        same = all(torch.equal(before[name], now) for name, now in policy.snapshot().items())
        told.append([counted, same, policy.version])

    for module in policy._trainable:
        module.zero_grad_buffer()
    policy.version = 0
    note(float("nan"))
    gradient = policy._trainable[0].buffers[0].grad_data
    if dist.get_rank() == 0:  # the others have to learn of it
        gradient[0] = torch.inf
    note(0.0)
    gradient.fill_(1.0)
    note(0.0)
    policy._optimizer_config = config
    return told


def error_of_a_division(policy: Any, problem: Any, layout: Any) -> str:
    """Comes last: neither weights nor optimizer are of use afterwards."""
    from policy_on_ranks import measure

    try:
        measure(policy, CASE, problem, layout=layout, fault=_division)
    except RunError as error:
        return str(error)
    return ""


def other_targets(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """Another target wherever the weight is 0."""
    assert any((row.loss.weights == 0).any() for row in rows), "no rejected sample here"

    def changed(tokens: Any) -> Any:
        others = (tokens.targets + 1) % VOCAB_SIZE
        return replace(tokens, targets=torch.where(tokens.weights == 0, others, tokens.targets))

    return tuple(replace(row, loss=changed(row.loss)) for row in rows)


def shift_one_target(policy: Any) -> Any:
    """The first token of data-parallel rank 0 is taken for its neighbour in the vocabulary."""

    def change(rows: tuple[Any, ...]) -> tuple[Any, ...]:
        if policy.groups.here.dp_rank:
            return rows
        targets = rows[0].loss.targets.clone()
        targets[0] = (targets[0] + 1) % VOCAB_SIZE
        shifted = replace(rows[0], loss=replace(rows[0].loss, targets=targets))
        return (shifted, *rows[1:])

    return change


def without_experts(policy: Any) -> Any:
    return lambda rows: tuple(row.without_experts for row in rows)


def experts_shifted(policy: Any) -> Any:
    """Each token is told what the one before it was routed by."""

    def shifted(row: Any) -> Any:
        experts = None if row.experts is None else row.experts.roll(1, 0)
        return replace(row, experts=experts)

    return lambda rows: tuple(map(shifted, rows))


def responses_without_prompt(policy: Any) -> Any:
    """Each run sees itself alone."""

    def alone(row: Any) -> Any:
        return replace(row, shared=None)

    return lambda rows: tuple(map(alone, rows))


def positions_go_on_behind_a_response(policy: Any) -> Any:
    """Rope counts the responses to a prompt as one behind the other."""

    def counted(row: Any) -> Any:
        return replace(row, position_ids=torch.arange(len(row.tokens)))

    return lambda rows: tuple(map(counted, rows))


CHANGES = {
    "responses_without_prompt": responses_without_prompt,
    "positions_go_on_behind_a_response": positions_go_on_behind_a_response,
    "one_target_shifted": shift_one_target,
    "experts_not_replayed": without_experts,
    "experts_of_the_token_before": experts_shifted,
}
"""Faults of the rows, and not of what computes."""


@contextmanager
def one_rank_doubled(policy: Any) -> Iterator[None]:
    from megatron_rl.megatron import schedule as module

    stock = module.finalize_model_grads

    def doubled(models: Any, num_tokens: Any, **rest: Any) -> None:
        if dist.get_rank() == 1:
            for parameter in (p for model in models for p in model.parameters()):
                parameter.main_grad.mul_(2)
        stock(models, num_tokens, **rest)

    with mock.patch.object(module, "finalize_model_grads", doubled):
        yield


@contextmanager
def no_data_parallel_reduction(policy: Any) -> Iterator[None]:
    from megatron.core.distributed import DistributedDataParallel

    with mock.patch.object(DistributedDataParallel, "finish_grad_sync", return_value=None):
        yield


@contextmanager
def no_reduction_of_experts(policy: Any) -> Iterator[None]:
    """Each pair of ranks with the same experts keeps its own gradient of them."""
    kept = [module.expert_parallel_bucket_groups for module in policy._trainable]
    assert all(kept)
    for module in policy._trainable:
        module.expert_parallel_bucket_groups = []
    yield
    for module, groups in zip(policy._trainable, kept, strict=True):
        module.expert_parallel_bucket_groups = groups


@contextmanager
def layers_from_one_too_far(policy: Any) -> Iterator[None]:
    """The last stage computes with the weights of the layer behind each of its own."""
    weights = policy.named_parameters() if policy.groups.is_last_stage else {}
    for name, weight in weights.items():
        behind = re.sub(r"(?<=layers\.)\d+", lambda found: str(int(found[0]) + 1), name)
        weight.copy_(weights.get(behind, weight))
    yield


@contextmanager
def no_reduction_of_norms(policy: Any) -> Iterator[None]:
    with _without_step_of_finalize("_allreduce_non_tensor_model_parallel_grads"):
        yield


@contextmanager
def no_reduction_of_tied_embedding(policy: Any) -> Iterator[None]:
    with _without_step_of_finalize("_allreduce_word_embedding_grads"):
        yield


def _without_step_of_finalize(name: str) -> Any:
    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    return mock.patch.object(module, name, return_value=None)


@contextmanager
def norms_without_tag(policy: Any) -> Iterator[None]:
    norms = [p for chunk in policy.chunks for n, p in chunk.named_parameters() if "layernorm" in n]
    assert norms
    assert all(norm.sequence_parallel for norm in norms)
    for norm in norms:
        norm.sequence_parallel = False
    yield
    for norm in norms:
        norm.sequence_parallel = True


@contextmanager
def no_reduction_behind_the_head(policy: Any) -> Iterator[None]:
    from megatron_rl.megatron import network as module

    with mock.patch.object(module, "copy_to_tensor_model_parallel_region", lambda hidden: hidden):
        yield


@contextmanager
def schedule_divides(policy: Any) -> Iterator[None]:
    """Under the definitions; what native ops make of it is a test of its own."""
    backend.choose("reference", CPU)
    with _division(policy):
        yield
    backend.choose("auto", CPU)


@contextmanager
def _division(policy: Any) -> Iterator[None]:
    policy.config.calculate_per_token_loss = False
    yield
    policy.config.calculate_per_token_loss = True


@contextmanager
def no_tensor_parallel_marks(policy: Any) -> Iterator[None]:
    """What perform_initialization=false did to us."""
    marked = [
        p
        for chunk in policy.chunks
        for p in chunk.parameters()
        if getattr(p, "tensor_model_parallel", False)
    ]
    assert marked
    for parameter in marked:
        parameter.tensor_model_parallel = False
    yield
    for parameter in marked:
        parameter.tensor_model_parallel = True


@contextmanager
def keys_of_own_tokens_alone(policy: Any) -> Iterator[None]:
    """Each part of a sequence attends to itself, and to a copy of itself."""
    from megatron_rl.megatron import split_attention as module

    def repeated(own: torch.Tensor, group: Any) -> torch.Tensor:
        return torch.cat([own] * group.size())

    with mock.patch.object(module, "_gathered", repeated):
        yield


@contextmanager
def keys_of_prompts_for_one_response(policy: Any) -> Iterator[None]:
    """A key has the gradient of one of those that see it, and not of all."""
    from megatron_rl.megatron import gathering as module

    def of_one(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (entries,) = ctx.saved_tensors
        added = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        return added.index_copy_(0, entries, gradient), None

    with mock.patch.object(module.Repeat, "backward", staticmethod(of_one)):
        yield


@contextmanager
def seam_shifted(policy: Any) -> Iterator[None]:
    """The last token of each chunk is predicted from the first of the rank's next one."""
    from megatron_rl.policy import policy as module

    stock = module.Policy._head

    def shifted(self: Any, hidden: torch.Tensor, own: Any) -> Any:
        jumps = torch.nonzero(own.at.diff() > 1)[:, 0]
        at = own.at.clone()
        at[jumps] += 1
        return stock(self, hidden, replace(own, at=at))

    with mock.patch.object(module.Policy, "_head", shifted):
        yield


@contextmanager
def positions_of_the_part(policy: Any) -> Iterator[None]:
    """Rope counts a rank's own tokens."""
    from megatron_rl.megatron import rope as module

    stock = module.Rope.rotation

    def counted(self: Any, position_ids: torch.Tensor) -> Any:
        return stock(self, torch.arange(len(position_ids)))

    with mock.patch.object(module.Rope, "rotation", counted):
        yield


@contextmanager
def no_reduction_of_keys(policy: Any) -> Iterator[None]:
    """The gradient of keys and values from the queries of other ranks is lost."""
    from megatron_rl.megatron import split_attention as module

    gather = module.gather_from_sequence_parallel_region

    def own_alone(own: torch.Tensor, _: bool, group: Any) -> torch.Tensor:
        return gather(own, False, group)

    with mock.patch.object(module, "gather_from_sequence_parallel_region", own_alone):
        yield


@contextmanager
def no_reduction_over_parts(policy: Any) -> Iterator[None]:
    with no_data_parallel_reduction(policy):
        yield


@contextmanager
def response_of_own_tokens_alone(policy: Any) -> Iterator[None]:
    """The mean over a response is that of the tokens that a rank predicts; others count as 0."""
    from megatron_rl.parallel import context as module

    with mock.patch.object(module.dist, "all_reduce", return_value=None):
        yield


@contextmanager
def experts_balanced_by_row(policy: Any) -> Iterator[None]:
    """All sequences of a row count as one."""
    with _other_rows(lambda row: (row.sequence_of * 0, row.is_counted, row.lengths.sum()[None])):
        yield


@contextmanager
def padding_balances_experts(policy: Any) -> Iterator[None]:
    with _other_rows(lambda row: (row.sequence_of, row.is_counted | True, row.lengths)):
        yield


def _other_rows(change: Any) -> Any:
    from megatron_rl.megatron import routers as module

    stock = module.Routers._row

    def changed(self: Any, batch: Any) -> Any:
        sequence_of, is_counted, lengths = change(stock(self, batch))
        return module.RoutedRow(sequence_of=sequence_of, is_counted=is_counted, lengths=lengths)

    return mock.patch.object(module.Routers, "_row", changed)


@contextmanager
def experts_balanced_by_part(policy: Any) -> Iterator[None]:
    """A rank counts the experts of its own tokens of a sequence."""
    modules = [router._module for router in policy.routers._routers]
    assert modules
    groups = [module.tp_cp_group for module in modules]
    for module in modules:
        module.tp_cp_group = mock.Mock(**{"size.return_value": 1})
    yield
    for module, group in zip(modules, groups, strict=True):
        module.tp_cp_group = group


@contextmanager
def losses_of_routers_by_rank(policy: Any) -> Iterator[None]:
    """Their share is that of a rank's own tokens."""
    from megatron_rl.megatron import routers as module

    stock = module.Routers.training

    @contextmanager
    def of_rank(self: Any, rows: Any) -> Iterator[None]:
        with stock(self, rows):
            self.num_tokens = sum(int(row.trained_lengths.sum()) for row in rows)
            yield

    with mock.patch.object(module.Routers, "training", of_rank):
        yield


@contextmanager
def experts_counted_on_one_rank(policy: Any) -> Iterator[None]:
    from megatron_rl.megatron import routers as module

    with mock.patch.object(module.Routers, "_sum_chosen", return_value=None):
        yield
