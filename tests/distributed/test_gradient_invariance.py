"""Product promise: the same loss and gradient at every parallel layout, batch split and order."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import harness
import pytest
import torch
import torch.distributed as dist
from cases import Case, cases_of, share_of
from reference import FORMULAS
from splits import LAYOUTS, Layout

from megatron_rl.algorithms.presets import PRESETS

OPTIMIZER = {"lr": 1e-3, "clip_grad": 0.0}  # Megatron-Core clips float32 only

# Sums of a few thousand float64 products, in another order; seen: 5e-15 and less.
BOUND = 1e-12
# Megatron-Core adds up the squares of the norm in float32, whatever the dtype.
NORM_BOUND = 1e-6


# What is measured at a layout: each case somewhere, or each case everywhere.
EXTENTS = {"share": share_of, "whole": cases_of}


@pytest.fixture(
    scope="module", params=["share", pytest.param("whole", marks=pytest.mark.exhaustive)]
)
def measurements(request, problems, tmp_path_factory):
    """Of cases at every layout, by the name of the layout; one start of ranks per world."""
    results: dict[str, list[dict]] = {}
    for world in (1, 2, 4):
        out = tmp_path_factory.mktemp("measured") / f"{world}.json"
        layouts = [layout for layout in LAYOUTS if layout.world == world]
        harness.run_on_ranks(world, measure_layouts, problems, layouts, request.param, out)
        for row in json.loads(out.read_text()):
            results.setdefault(row["layout"], []).append(row)
    return results


def measure_layouts(
    problems: dict[str, Path], layouts: list[Layout], extent: str, out: Path
) -> None:
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
    rows = []
    for layout in layouts:
        problem = loaded[layout.model]
        with policy_at(layout, problem, OptimizerConfig(**OPTIMIZER)) as policy:
            assert uncovered_elements(policy) == 0, layout.name
            for case in EXTENTS[extent](layout):
                rows.append(asdict(measure(policy, case, problem, layout=layout)))
                assert not policy.groups.is_last_stage or head_is_in_main_grad(policy), layout.name
            assert padding_gradient(policy, named_main_grads(policy)) == 0, layout.name
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))


def test_the_reference_knows_every_preset():
    assert set(FORMULAS) == set(PRESETS)


def test_the_shares_of_all_layouts_are_the_whole():
    def of_several_ranks(cases: Callable[[Layout], Iterable[Case]]) -> set[Case]:
        return {case for layout in LAYOUTS if layout.world > 1 for case in cases(layout)}

    assert of_several_ranks(share_of) == of_several_ranks(cases_of)
    for layout in LAYOUTS:
        assert set(share_of(layout)) <= set(cases_of(layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_and_gradients_equal_the_unsharded_ones(measurements, layout):
    rows = measurements[layout.name]
    wrong = [row for row in rows if not max(row["loss_error"], row["gradient_error"]) < BOUND]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_gradient_norm_equals_the_unsharded_one(measurements, layout):
    wrong = [row for row in measurements[layout.name] if not row["norm_error"] < NORM_BOUND]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.auxiliary], ids=lambda layout: layout.name
)
def test_the_losses_of_routers_are_reported_as_the_unsharded_ones(measurements, layout):
    rows = measurements[layout.name]
    wrong = [row for row in rows if not row["auxiliary_error"] < BOUND]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_pass_that_measures_routes_as_the_engine_did(measurements):
    rows = [row for found in measurements.values() for row in found]
    errors = [row["logprob_error"] for row in rows if "routed" in row["case"]]
    assert len(errors) > 6
    assert max(errors) < BOUND


def test_the_cases_are_what_they_are_for(measurements, problems):
    """Rows from one to many, other counts on other ranks, ranks without a sample, real clipping."""
    rows = measurements["DP2"]
    assert {1, 2} <= {len(set(row["rows"])) for row in rows}, "no ragged counts"
    assert max(max(row["rows"]) for row in rows) > 4 > 1 == min(min(row["rows"]) for row in rows)
    assert any(row["empty_ranks"] for row in rows)
    answers = torch.load(problems["qwen2"], weights_only=False).answers
    clipped = [a for q, a in answers.items() if q.has_old and q.recipe.preset == "grpo"]
    assert clipped
    assert all(answer.clipped_low > 20 and answer.clipped_high > 20 for answer in clipped)
