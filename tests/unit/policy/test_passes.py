"""What `plan` and the start of a run say of the passes of an update."""

import pytest

from megatron_rl.algorithms.algorithm import Algorithm
from megatron_rl.config import RunConfig, problems
from megatron_rl.policy.passes import plan_passes


def recipe(algorithm, **optimizer):
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "none", "num_iterations": 1},
            "model": {"path": "none"},
            "prompts": {"path": "none", "prompts_per_iteration": 16},
            "optimizer": {"prompts_per_update": 4, **optimizer},
            "algorithm": algorithm,
        }
    )


def passes_of(config):
    return plan_passes(Algorithm(config.algorithm), **config.steps_of_iteration)


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
    return dict(passes_of(config).reasons)


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


def test_no_pass_computes_what_came_with_the_samples():
    own, engines = (
        passes_of(recipe({"preset": "grpo"}, old_logprobs=whose)) for whose in ("trainer", "engine")
    )
    assert (own.old, own.by_engine) == (True, False)
    assert (engines.old, engines.by_engine, engines.old_first) == (False, True, True)
    assert dict(engines.reasons)["old-log-prob pass"].startswith("skipped, the engine's")


def of_engine(engine, dtype="float32", algorithm=None, **optimizer):
    """The passes where this engine samples; two updates of an iteration."""
    config = recipe(algorithm or {"preset": "grpo"}, **optimizer)
    changed = config.model_dump(exclude_unset=True)
    changed["rollout"] = {"engine": engine}
    changed["model"] |= {"dtype": dtype}
    changed["optimizer"] |= {"clip_grad": 0}
    return passes_of(RunConfig.model_validate(changed))


def test_what_the_policy_itself_said_of_its_samples_is_not_computed_again():
    itself = of_engine("megatron")
    assert (itself.old, itself.by_engine, itself.old_first) == (False, True, False)
    assert dict(itself.reasons)["old-log-prob pass"] == (
        "skipped, the policy itself sampled, and said what is old"
    )
    assert of_engine("megatron", "float64").by_engine
    for other in (
        of_engine("vllm"),
        of_engine("auto"),
        of_engine("megatron", "bfloat16"),
        of_engine("megatron", old_logprobs="trainer"),
        of_engine("megatron", algorithm={"preset": "grpo", "rollout_correction": {}}),
    ):
        assert (other.old, other.by_engine) == (True, False)


def test_where_no_pass_is_spared_the_first_ratio_stays_exactly_1():
    alone = of_engine("megatron", prompts_per_update=16)
    assert (alone.old, alone.by_engine) == (False, False)
    assert "ratio exactly 1" in dict(alone.reasons)["old-log-prob pass"]
    without = of_engine("megatron", algorithm={"preset": "raft"})
    assert (without.old, without.by_engine) == (False, False)
    taught = of_engine("megatron", algorithm={"preset": "distillation"}, prompts_per_update=16)
    assert (taught.old, taught.by_engine, taught.old_first) == (False, True, True)


@pytest.mark.parametrize(
    ("algorithm", "rule"),
    [
        ({"preset": "grpo"}, None),
        ({"preset": "distillation"}, None),
        ({"preset": "ppo", "kl_reward_coef": 0.1}, None),
        ({"preset": "iterative_dpo", "objective": {"reference": "previous_iteration"}}, None),
        ({"preset": "raft"}, "has no effect, nothing in this algorithm uses old log-probs"),
        ({"preset": "sft"}, "gold responses come from no engine"),
        ({"preset": "grpo", "rollout_correction": {}}, "has no sense beside"),
    ],
    ids=lambda value: value["preset"] if isinstance(value, dict) else "",
)
def test_the_engines_are_old_ones_only_where_they_are_used(algorithm, rule):
    config = recipe(algorithm, old_logprobs="engine")
    found = [str(p) for p in problems(config) if str(p).startswith("optimizer.old_logprobs")]
    assert [rule in text for text in found] == [True] * (rule is not None)
    assert not [
        p for p in problems(recipe(algorithm)) if str(p).startswith("optimizer.old_logprobs")
    ]
