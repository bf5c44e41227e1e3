"""Gradients that are reduced during the backward: the same weights, bit for bit, as after it.

That is so with two replicas, whose sum has one order. With more, a sum is rounded by where a bucket
ends, and the gradient table has such a layout.
"""

import json
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import torch.distributed as dist
from layout import Layout

LAYOUTS = (
    Layout(name="DP2", world=2),
    Layout(name="DP2, tied", world=2, model="qwen2_tied"),
    Layout(name="DP2, experts", world=2, model="qwen3_moe"),
    Layout(name="PP2 DP2, tied", world=4, pp=2, model="qwen2_tied"),
    Layout(name="PP2 VPP2 DP2", world=4, pp=2, vpp=2),
    Layout(name="DP2 EP2", world=2, ep=2, model="qwen3_moe"),
)
UPDATES = 3  # Megatron learns in the first one which gradients a bucket waits for


@pytest.fixture(scope="module")
def found(problems, tmp_path_factory):
    """Layout -> whether all ranks have the same weights, and how many buckets went early."""
    told: dict[str, dict] = {}
    for world in (2, 4):
        out = tmp_path_factory.mktemp("overlap") / f"{world}.json"
        layouts = [layout for layout in LAYOUTS if layout.world == world]
        harness.run_on_ranks(world, compare, problems, layouts, out)
        told |= json.loads(out.read_text())
    return told


def compare(problems: dict[str, Path], layouts: list[Layout], out: Path) -> None:
    import torch

    told = {}
    for layout in layouts:
        problem = torch.load(problems[layout.model], weights_only=False)
        after, none = train(layout, problem)
        during, early = train(replace(layout, overlaps_reduction=True), problem)
        is_same = all(torch.equal(after[name], during[name]) for name in after)
        everyone = [None] * layout.world
        dist.all_gather_object(everyone, (is_same, none, early))
        told[layout.name] = everyone
    if dist.get_rank() == 0:
        out.write_text(json.dumps(told))


def train(layout: Layout, problem):
    """Weights after a few updates in float32, and buckets whose reduction a backward started."""
    from unittest import mock

    from cases import cases_of
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from policy_on_ranks import algorithm_of, microbatches_of, policy_at, small_buckets

    from megatron_rl.megatron.config import OptimizerConfig

    early = 0
    stock = _ParamAndGradBucketGroup.register_grad_ready

    def counting(group, *args, **settings):
        nonlocal early
        before = group.grad_reduce_handle
        stock(group, *args, **settings)
        early += group.grad_reduce_handle is not before

    # Without clipping: a norm is summed by shards, and those are cut out of buckets.
    settings = OptimizerConfig(lr=1e-3, clip_grad=0.0)
    count = mock.patch.object(_ParamAndGradBucketGroup, "register_grad_ready", counting)
    with small_buckets(), policy_at(layout, problem, settings, "float32") as policy, count:
        case = next(iter(cases_of(layout)))
        rows = tuple(row.with_loss() for row in microbatches_of(policy, case, problem))
        for number in range(UPDATES):  # not all of as many rows, as in a run
            policy.update(rows * (1 + number % 2), algorithm_of(case.question.recipe).loss())
        return policy.snapshot(), early


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_weights_are_the_same_bit_for_bit(found, layout):
    assert all(is_same for is_same, _, _ in found[layout])


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_buckets_are_reduced_during_the_backward_where_it_is_asked_for(found, layout):
    for _, after, during in found[layout]:
        assert after == 0
        assert during > UPDATES
