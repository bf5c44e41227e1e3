"""The gradient is the slope of the loss: no formula of a gradient, only losses of moved weights."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import EVERY_TERM, Question, question_of
from harness import run_on_ranks
from splits import LAYOUTS

QUESTIONS = {
    "every term": Question(recipe=EVERY_TERM),
    "raft": question_of("raft"),
    "ppo": question_of("ppo", gamma=0.9, gae_lambda=0.8, kl_reward_coef=0.3),
    "iterative_dpo": question_of("iterative_dpo", dpo_beta=0.7),
}
STEP = 1e-6  # of float64 weights: rounding is 1e-16 / 1e-6, curvature 1e-12
BOUND = 1e-7


@pytest.fixture(scope="module")
def slopes(problems, tmp_path_factory):
    out = tmp_path_factory.mktemp("slopes") / "slopes.json"
    run_on_ranks(1, measure_slopes, problems, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_slope_along_random_directions_is_the_gradients(slopes, name):
    for slope, from_gradient, scale in slopes[name]:
        assert abs(slope - from_gradient) < BOUND * scale
        assert abs(from_gradient) > 1e-3 * scale  # the direction is not one where nothing happens


def measure_slopes(problems: dict[str, Path], out: Path) -> None:
    from cases import Case
    from policy_on_ranks import algorithm_of, microbatches_of, named_main_grads, policy_at

    from megatron_rl.megatron.config import OptimizerConfig

    (layout,) = (layout for layout in LAYOUTS if layout.name == "one rank")
    problem = torch.load(problems[layout.model], weights_only=False)
    found: dict[str, list[tuple[float, float, float]]] = {}
    with policy_at(layout, problem, OptimizerConfig(lr=1e-3, clip_grad=0.0)) as policy:
        start = policy.snapshot()
        for name, question in QUESTIONS.items():
            rows = microbatches_of(policy, Case(question=question), problem)
            loss = algorithm_of(question.recipe).loss()

            def loss_at(shift: dict[str, torch.Tensor], step: float, rows=rows, loss=loss) -> float:
                for key, parameter in policy.named_parameters().items():
                    parameter.copy_(start[key] + step * shift[key])
                value: float = policy.update(rows, loss).metrics["policy/loss"]
                return value

            still = {key: torch.zeros_like(value) for key, value in start.items()}
            loss_at(still, 0.0)
            gradient = {key: value.clone() for key, value in named_main_grads(policy).items()}
            norm = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
            generator = torch.Generator().manual_seed(4)
            for _ in range(2):
                shift = {
                    key: torch.randn(value.shape, generator=generator, dtype=torch.float64)
                    + 5 * gradient[key] / norm
                    for key, value in start.items()
                }
                slope = (loss_at(shift, STEP) - loss_at(shift, -STEP)) / (2 * STEP)
                along = sum(float((gradient[key] * shift[key]).sum()) for key in gradient)
                found.setdefault(name, []).append((slope, along, norm))
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
