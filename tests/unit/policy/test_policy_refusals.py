"""What prompts that are shared cannot go with."""

import pytest

from megatron_rl.config import RunConfig
from megatron_rl.megatron.config import ModelConfig
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.policy.refusals import layer_spec_problems, sharing_problems


def told(*, parallel=None, model=None, most_responses=8, replays_routing=False):
    problems = sharing_problems(
        ParallelConfig(**parallel or {}),
        ModelConfig(path="any", **model or {}),
        most_responses,
        replays_routing=replays_routing,
    )
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": {"context_parallel_size": 2}}, "cannot be split over context-parallel"),
        ({"model": {"megatron": {"moe_z_loss_coeff": 0.1}}}, "for the routers' balance"),
        ({"replays_routing": True}, "the engine routed it for each response"),
        ({"most_responses": 1}, "has no effect with one response"),
    ],
)
def test_each_has_its_reason(settings, message):
    (problem,) = told(**settings)
    assert problem.startswith("batching.share_prompts=True: ")
    assert message in problem
    assert "Set batching.share_prompts=false" in problem


def test_what_is_usual_has_no_problem():
    assert told(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}) == []


def test_layers_of_transformer_engine_are_refused_by_device():
    model = ModelConfig(path="any", layer_spec="transformer_engine")
    (problem,) = layer_spec_problems(True, model, "cuda")
    assert "set model.layer_spec=local" in str(problem)
    local = ModelConfig(path="any", layer_spec="local")
    assert not list(layer_spec_problems(True, local, "cuda"))
    for not_asked in (False, "auto"):
        assert not list(layer_spec_problems(not_asked, model, "cuda"))


def shares(device_type="cpu", **sections):
    recipe = {
        "model": {"path": "any"},
        "prompts": {"path": "any"},
        "algorithm": {"preset": "grpo"},
        "rollout": {"engine": "megatron"},
        "run": {"output_dir": "any", "num_iterations": 1},
    }
    recipe = {name: settings | sections.pop(name, {}) for name, settings in recipe.items()}
    return RunConfig.model_validate(recipe | sections).shares_prompts_on(device_type)


def test_they_are_shared_wherever_nothing_refuses_it():
    assert shares()
    assert shares("cuda", model={"layer_spec": "local"})
    assert not shares("cuda", model={"layer_spec": "transformer_engine"})
    assert not shares(parallel={"context_parallel_size": 2})
    assert not shares(model={"megatron": {"moe_z_loss_coeff": 0.1}})
    assert not shares(rollout={"group_size": 1})
    assert not shares(batching={"share_prompts": False})
