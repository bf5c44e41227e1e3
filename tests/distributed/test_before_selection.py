"""Entropy and KL of everything drawn, at any layout, equal those of Hugging Face's model."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import TEMPERATURE, owned
from harness import run_on_ranks
from reference import Reference
from splits import LAYOUTS

NAMES = {2: ("DP2", "TP2 SP", "PP2"), 4: ("TP2 PP2", "TP2 DP2")}
BOUND = 1e-12


@pytest.fixture(scope="module")
def measured(problems, tmp_path_factory):
    found = {}
    for world in NAMES:
        out = tmp_path_factory.mktemp("before_selection") / f"{world}.json"
        run_on_ranks(world, measure_on_ranks, problems["qwen2"], out)
        found |= json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def expected(problems):
    """Means over all response tokens of all groups, rejected ones among them."""
    problem = torch.load(problems["qwen2"], weights_only=False)
    groups = problem.groups["graded"]
    with torch.no_grad():
        logprobs, entropies = Reference(problem.model_dir, temperature=TEMPERATURE).logprobs(groups)
    log_ratio = torch.cat(
        [
            rollout.rollout_logprobs.double() - logprobs[group.prompt.group_id, index]
            for group in groups
            for index, rollout in enumerate(group.rollouts)
        ]
    )
    return {
        "policy/entropy_sampled": torch.cat(list(entropies.values())).mean().item(),
        "policy/kl_initial_k1": log_ratio.mean().item(),
        "policy/kl_initial_k3": ((-log_ratio).exp() - 1 + log_ratio).mean().item(),
    }


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_every_response_counts_at_every_layout(measured, expected, name):
    assert measured[f"{name}, iteration 6"] == pytest.approx(expected, rel=BOUND)


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_each_is_measured_when_it_is_due(measured, name):
    assert measured[f"{name}, iteration 1"] == {}
    assert set(measured[f"{name}, iteration 4"]) == {"policy/kl_initial_k1", "policy/kl_initial_k3"}


def measure_on_ranks(problem_file: Path, out: Path) -> None:
    from policy_on_ranks import algorithm_of, packer_of, policy_at
    from reference import Recipe

    from megatron_rl.megatron.config import OptimizerConfig
    from megatron_rl.metrics.config import MetricsConfig
    from megatron_rl.policy.before_selection import BeforeSelection

    problem = torch.load(problem_file, weights_only=False)
    found = {}
    for layout in (y for y in LAYOUTS if y.name in NAMES[dist.get_world_size()]):
        with policy_at(layout, problem, OptimizerConfig(lr=1e-3, clip_grad=0.0)) as policy:
            reported: dict[str, float] = {}
            measures = BeforeSelection(
                policy,
                packer_of(policy, algorithm_of(Recipe(preset="raft")), row_tokens=150),
                policy.snapshot(),
                reported.update,
                MetricsConfig(entropy_every=3, kl_rollouts=1000),
                kl_every=2,
            )
            rank, world = dist.get_rank(), dist.get_world_size()
            own = owned(problem.groups["graded"], "by turns", rank, world)
            for iteration in (1, 4, 6):
                reported.clear()
                measures.measure(own, iteration)
                found[f"{layout.name}, iteration {iteration}"] = dict(reported)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
