"""The comparison of test_gradient_invariance notices faults, and only faults."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradient_faults
import pytest
import torch
import torch.distributed as dist
from cases import FEW_ROWS, MANY_ROWS, Case, Question, question_of
from harness import run_on_ranks
from reference import Recipe
from splits import LAYOUTS

from megatron_rl.errors import RunError
from megatron_rl.ops import native

CPU = torch.device("cpu")
NOTICED = 1e-3
BOUND = 1e-12

CASE = Case(question=question_of("grpo"), row_tokens=MANY_ROWS)
OF_RESPONSES = Case(question=question_of("gspo"), row_tokens=MANY_ROWS)
ROUTED = Case(
    question=Question(recipe=Recipe(preset="grpo"), groups="routed"), row_tokens=MANY_ROWS
)
PADDED = Case(question=Question(recipe=Recipe(preset="reinforce"), groups="lonely"))
WITH_REJECTED = Case(
    question=question_of("reinforce_rej"), row_tokens=MANY_ROWS, train_on_everything=True
)

SIGMOIDS = "CP2 EP2, sigmoids, all recomputed"
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
    "biases_moved_by_rank": ((SIGMOIDS,), "bias_error"),
    "padding_moves_biases": ((SIGMOIDS,), "bias_error"),
    "experts_not_replayed": ((BALANCED,), "gradient_error"),
    "experts_of_the_token_before": ((BALANCED,), "gradient_error"),
}
WHERE = ("DP2", "TP2", "TP2 SP", "PP2", "PP2, tied", "CP2")
OTHERS = ("DP2, shared prompts", "DP4 EP2", "PP2 of 1, 3", BALANCED, "DP2, balanced", SIGMOIDS)
CASES_OF = {
    "response_of_own_tokens_alone": OF_RESPONSES,
    "experts_not_replayed": ROUTED,
    "experts_of_the_token_before": ROUTED,
    "padding_moves_biases": PADDED,
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
                make = gradient_faults.CHANGES.get(fault)
                change = make(policy) if make else None
                inject = None if make else getattr(gradient_faults, fault)
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
        for name in ("gradient_error", "bias_error", "loss_error", "norm_error", "worst_tensor")
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
        (
            "targets",
            gradients(WITH_REJECTED),
            gradients(WITH_REJECTED, gradient_faults.other_targets),
        ),
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
        measure(policy, CASE, problem, layout=layout, fault=gradient_faults.division)
    except RunError as error:
        return str(error)
    return ""
