"""Product promise: the same loss and gradient at every parallel layout, batch split and order.

--measured=DIR keeps what was measured, a file a layout, for the published table; --part=2/8
measures the second of eight parts of the layouts, into the same DIR.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import harness
import pytest
import torch
import torch.distributed as dist
from cases import ROUTED, Case, cases_of, least_cases, share_of
from layout import Layout
from reference import FORMULAS
from splits import LAYOUTS
from tiny_models import LATENTS

from megatron_rl.algorithms.presets import PRESETS

OPTIMIZER = {"lr": 1e-3, "clip_grad": 0.0}  # Megatron-Core clips float32 only

# Sums of a few thousand float64 products, in another order; seen: 5e-15 and less.
BOUND = 1e-12
WITH_BIASES = ("glm4_moe", *LATENTS)
# Megatron-Core adds up the squares of the norm in float32, whatever the dtype.
NORM_BOUND = 1e-6


# What is measured at a layout: each case somewhere, or each case everywhere.
EXTENTS = {"share": share_of, "whole": cases_of}


WHOLE = pytest.mark.exhaustive
EVERYWHERE = [
    *(pytest.param("share", y.name, id=y.name) for y in LAYOUTS if y.is_daily),
    *(pytest.param("whole", y.name, id=f"{y.name}, whole", marks=WHOLE) for y in LAYOUTS),
]


@pytest.fixture(scope="module")
def measurements(request, problems, tmp_path_factory):
    """What is asked for, by extent and layout; one start of ranks per world."""
    results: dict[tuple[str, str], list[dict]] = {}
    kept = request.config.getoption("measured")
    asked = set(harness.asked_for(request, "extent", "name"))
    for extent in EXTENTS:
        folder = tmp_path_factory.mktemp("measured")
        if kept and extent == "whole":
            folder = Path(kept)
            folder.mkdir(parents=True, exist_ok=True)
        here = [layout for layout in LAYOUTS if (extent, layout.name) in asked]
        for world in sorted({layout.world for layout in here}):
            layouts = [layout for layout in here if layout.world == world]
            harness.run_on_ranks(world, measure_layouts, problems, layouts, extent, folder)
        for layout in here:
            measured = json.loads((folder / f"{layout.name}.json").read_text())
            results[extent, layout.name] = measured["cases"]
    return results


def measure_layouts(
    problems: dict[str, Path], layouts: list[Layout], extent: str, folder: Path
) -> None:
    """Every case at the layouts, each of which gets a file."""
    from policy_on_ranks import (
        head_is_in_main_grad,
        measure,
        named_main_grads,
        padding_gradient,
        policy_at,
        uncovered_elements,
    )

    from megatron_rl.megatron.config import OptimizerConfig

    loaded = {m: torch.load(problems[m], weights_only=False) for m in {y.model for y in layouts}}
    for layout in layouts:
        problem = loaded[layout.model]
        with policy_at(layout, problem, OptimizerConfig(**OPTIMIZER)) as policy:
            assert uncovered_elements(policy) == 0, layout.name
            rows = []
            for case in EXTENTS[extent](layout):
                rows.append(asdict(measure(policy, case, problem, layout=layout)))
                assert not policy.groups.is_last_stage or head_is_in_main_grad(policy), layout.name
            assert padding_gradient(policy, named_main_grads(policy)) == 0, layout.name
        if dist.get_rank() == 0:
            place = {"number": LAYOUTS.index(layout), "world": layout.world}
            found = {"layout": layout.name, **place, "cases": rows}
            (folder / f"{layout.name}.json").write_text(json.dumps(found))


def test_the_reference_knows_every_preset():
    assert set(FORMULAS) == set(PRESETS)


def test_the_shares_of_all_layouts_are_the_whole():
    def of_several_ranks(cases: Callable[[Layout], Iterable[Case]]) -> set[Case]:
        several = [layout for layout in LAYOUTS if layout.world > 1 and layout.is_daily]
        return {case for layout in several for case in cases(layout)}

    assert of_several_ranks(share_of) == of_several_ranks(cases_of)
    for layout in LAYOUTS:
        assert set(share_of(layout)) <= set(cases_of(layout))


def test_layouts_that_take_turns_have_every_case_together():
    taking = [layout for layout in LAYOUTS if layout.takes_turns]
    turns = [set(cases_of(layout)) for layout in taking]
    (whole,) = (set(cases_of(layout)) for layout in LAYOUTS if layout.name == "one rank")
    assert set.union(*turns) >= whole
    least = [set(least_cases(layout)) for layout in taking]
    assert all(some < cases for some, cases in zip(least, turns, strict=True))


@pytest.mark.parametrize(("extent", "name"), EVERYWHERE)
def test_loss_and_gradients_equal_the_unsharded_ones(measurements, extent, name):
    rows = measurements[extent, name]
    assert rows
    wrong = [row for row in rows if not max(row["loss_error"], row["gradient_error"]) < BOUND]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(("extent", "name"), EVERYWHERE)
def test_the_gradient_norm_equals_the_unsharded_one(measurements, extent, name):
    wrong = [row for row in measurements[extent, name] if not row["norm_error"] < NORM_BOUND]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("extent", "name"), [("share", layout.name) for layout in LAYOUTS if layout.auxiliary]
)
def test_the_losses_of_routers_are_reported_as_the_unsharded_ones(measurements, extent, name):
    rows = measurements[extent, name]
    wrong = [row for row in rows if not row["auxiliary_error"] < BOUND]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("extent", "name"),
    [("share", y.name) for y in LAYOUTS if y.model in WITH_BIASES and y.is_daily],
)
def test_biases_of_routers_move_by_what_the_update_chose(measurements, extent, name):
    """To the last bit: up where an expert was chosen less often than the mean, else down."""
    rows = measurements[extent, name]
    assert not [row for row in rows if row["bias_error"] > 0]
    moves = "moe_router_bias_update_rate" in dict(
        next(y.megatron for y in LAYOUTS if y.name == name)
    )
    assert all((row["biases_moved"] > 0) == moves for row in rows)


@pytest.mark.parametrize(
    ("extent", "name"),
    [("share", layout.name) for layout in LAYOUTS if layout.model == ROUTED and layout.auxiliary],
)
def test_a_pass_that_measures_routes_as_the_engine_did(measurements, extent, name):
    rows = measurements[extent, name]
    errors = [row["logprob_error"] for row in rows if "routed" in row["case"]]
    assert errors
    assert max(errors) < BOUND


@pytest.mark.parametrize(("extent", "name"), [("share", "DP2")])
def test_the_cases_are_what_they_are_for(measurements, problems, extent, name):
    """Rows from one to many, other counts on other ranks, ranks without a sample, real clipping."""
    rows = measurements[extent, name]
    assert {1, 2} <= {len(set(row["rows"])) for row in rows}, "no ragged counts"
    assert max(max(row["rows"]) for row in rows) > 4 > 1 == min(min(row["rows"]) for row in rows)
    assert any(row["empty_ranks"] for row in rows)
    answers = torch.load(problems["qwen2"], weights_only=False).answers
    clipped = [a for q, a in answers.items() if q.has_old and q.recipe.preset == "grpo"]
    assert clipped
    assert all(answer.clipped_low > 20 and answer.clipped_high > 20 for answer in clipped)
