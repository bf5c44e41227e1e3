"""What prompts that are shared cannot go with."""

import pytest

from megatron_rl.batching.config import BatchingConfig
from megatron_rl.megatron.config import ModelConfig
from megatron_rl.parallel.config import ParallelConfig
from megatron_rl.policy.refusals import layer_spec_problems, sharing_problems

SHARED = BatchingConfig(share_prompts=True)


def told(batching=SHARED, *, parallel=None, model=None, most_responses=8, replays_routing=False):
    return [
        str(problem)
        for problem in sharing_problems(
            batching,
            ParallelConfig(**parallel or {}),
            ModelConfig(path="any", **model or {}),
            most_responses=most_responses,
            replays_routing=replays_routing,
        )
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parallel": {"context_parallel_size": 2}}, "cannot be split over context-parallel"),
        ({"model": {"megatron": {"moe_z_loss_coeff": 0.1}}}, "for the routers' balance"),
        ({"replays_routing": True}, "the engine routed it for each response"),
        ({"most_responses": 1}, "has no effect with one response"),
    ],
)
def test_each_has_its_reason_and_none_without_sharing(settings, message):
    (problem,) = told(**settings)
    assert problem.startswith("batching.share_prompts=True: ")
    assert message in problem
    assert "Set batching.share_prompts=false" in problem
    assert told(BatchingConfig(), **settings) == []


def test_what_is_usual_has_no_problem():
    assert told(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}) == []


def test_layers_of_transformer_engine_are_refused_by_device():
    model = ModelConfig(path="any", layer_spec="transformer_engine")
    (problem,) = layer_spec_problems(SHARED, model, "cuda")
    assert "set model.layer_spec=local" in str(problem)
    local = ModelConfig(path="any", layer_spec="local")
    assert not list(layer_spec_problems(SHARED, local, "cuda"))
    assert not list(layer_spec_problems(BatchingConfig(), model, "cuda"))
