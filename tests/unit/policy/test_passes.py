"""What `plan` and the start of a run say of the passes of an update."""

import pytest

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.config import RunConfig
from megatron_rl.policy.passes import plan_passes


def reasons(megatron=None, *, replays=False):
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": "none", "num_iterations": 1},
            "model": {"path": "none", "megatron": megatron or {}},
            "prompts": {"path": "none", "prompts_per_iteration": 16, "max_prompt_tokens": 24},
            "rollout": {"group_size": 2, "max_response_tokens": 8, "routing_replay": replays},
            "algorithm": {"preset": "grpo"},
        }
    )
    return dict(plan_passes(Algorithm(config.algorithm), **config.steps_of_iteration).reasons)


@pytest.mark.parametrize(
    ("kind", "counts"), [("none", False), ("seq_aux_loss", False), ("global_aux_loss", True)]
)
def test_a_pass_that_counts_experts_is_told_where_a_loss_is_over_whole_updates(kind, counts):
    losses = {"moe_router_load_balancing_type": kind}
    if kind != "none":
        losses["moe_aux_loss_coeff"] = 0.01
    assert ("pass that counts experts" in reasons(losses)) == counts


def test_replay_is_told_with_what_it_is_not_for():
    assert "routing replay" not in reasons()
    assert "references and critic their own" in reasons(replays=True)["routing replay"]
